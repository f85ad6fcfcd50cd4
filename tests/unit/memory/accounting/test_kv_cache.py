from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory.accounting.block_chain import BlockChain, prefix_root
from loraplex.memory.accounting.block_manager import BlockManager, IntegrityError, Owner
from loraplex.memory.accounting.eviction import EvictionClock
from loraplex.memory.accounting.kv_cache import KVCache

BLOCK = 4


class Cache(KVCache):
    """A KV cache with a pool of its own."""

    def __init__(self, num_pages: int = 32, **options: bool) -> None:
        self.blocks = BlockManager(num_pages)
        super().__init__(self.blocks, EvictionClock(), BLOCK, **options)


def make(num_pages: int = 32) -> Cache:
    return Cache(num_pages)


def check(kv: Cache) -> None:
    kv.check_integrity()
    kv.blocks.check_integrity(kv.claims())


def start(
    kv: Cache,
    request_id: str,
    tokens: list[int],
    *,
    root: bytes = b"root",
    changes: list[tuple[int, str]] | None = None,
    computed: int = -1,
) -> int:
    """Open a request, register its first `computed` tokens (all by default); returns the hits."""
    token_ids = array("i", tokens)
    chain = BlockChain(root, BLOCK, changes or [])
    prefix = kv.find_prefix(chain, token_ids).page_ids
    kv.open(request_id, chain, prefix)
    kv.grow(request_id, len(tokens))
    kv.register(request_id, token_ids, len(tokens) if computed < 0 else computed)
    check(kv)
    return len(prefix)


def test_full_prompt_hit_still_computes_a_token() -> None:
    kv = make()
    tokens = list(range(8))
    assert start(kv, "a", tokens) == 0
    assert start(kv, "b", tokens) == 1  # the second block holds the last token
    assert start(kv, "c", [*tokens, 9]) == 2


def test_pages_are_shared_while_in_use_and_after() -> None:
    kv = make()
    start(kv, "a", list(range(9)))
    start(kv, "b", list(range(9)))
    assert kv.page_ids("a")[:2] == kv.page_ids("b")[:2]
    assert kv.page_ids("a")[2] != kv.page_ids("b")[2]
    kv.release("a")
    check(kv)
    assert kv.num_idle == 0
    kv.release("b")
    check(kv)
    assert kv.num_idle == 2
    assert start(kv, "c", list(range(9))) == 2
    assert kv.num_idle == 0


def test_block_is_shared_only_once_computed() -> None:
    kv = make()
    start(kv, "a", list(range(12)), computed=7)
    assert start(kv, "b", list(range(12))) == 1


def test_planned_block_is_shared_from_the_next_step_on() -> None:
    kv, token_ids = make(), array("i", range(9))
    start(kv, "a", list(token_ids), computed=0)
    assert not kv.find_prefix(BlockChain(b"root", BLOCK), token_ids).is_growing
    kv.register_planned("a", token_ids, 7)
    check(kv)
    assert kv.find_prefix(BlockChain(b"root", BLOCK), token_ids) == ([], True)
    kv.blocks.num_planned += 1
    first = kv.page_ids("a")[:1]
    assert kv.find_prefix(BlockChain(b"root", BLOCK), token_ids) == (first, False)
    kv.register_planned("a", token_ids, 9)
    assert kv.find_prefix(BlockChain(b"root", BLOCK), token_ids) == (first, True)
    other = array("i", [*range(4), *range(9)])  # shares the first block alone
    assert kv.find_prefix(BlockChain(b"root", BLOCK), other) == (first, False)
    assert kv.find_prefix(BlockChain(b"root", BLOCK), token_ids[:8]) == (first, False)
    assert kv.find_prefix(BlockChain(b"other root", BLOCK), token_ids) == ([], False)


def test_equal_blocks_computed_twice_stay_apart() -> None:
    kv = make()
    start(kv, "a", list(range(9)), computed=0)
    start(kv, "b", list(range(9)))
    kv.register("a", array("i", range(9)), 9)
    check(kv)
    kv.release("a")  # none of a's pages is the findable one
    assert kv.num_idle == 0
    kv.release("b")
    assert kv.num_idle == 2
    check(kv)


def test_hit_stops_at_the_first_block_that_is_missing() -> None:
    kv = make()
    start(kv, "a", list(range(12)))
    first = kv.page_ids("a")[0]
    kv.release("a")
    kv.evict(first)
    check(kv)
    assert start(kv, "b", list(range(12))) == 0


def test_deepest_block_goes_first_whatever_shares_the_root() -> None:
    kv = make()
    start(kv, "a", list(range(12)))
    pages = list(kv.page_ids("a"))
    kv.release("a")
    assert start(kv, "b", [*range(4), 99, *range(20, 30)]) == 1
    kv.release("b")  # the root fell idle again, later than what stands on it
    order = []
    while (found := kv.first_idle()) is not None:
        order.append(found[1])
        kv.evict(found[1])
        check(kv)
    assert order[:2] == pages[:0:-1]
    assert order[-1] == pages[0]


def root_of(tenant: str, salt: str, base: str) -> bytes:
    return prefix_root(tenant=tenant, salt=salt, base_fingerprint=base)


def test_another_history_or_root_is_no_hit() -> None:
    kv = make(100)
    start(kv, "a", list(range(12)))
    assert start(kv, "b", [99, *range(1, 12)]) == 0
    for index, parts in enumerate(
        [
            ("", "", "base", "h1"),
            ("", "salt", "base", "h1"),
            ("", "salt", "base", ""),
            ("", "sal", "tbase", ""),
            ("", "salt", "other", "h1"),
            ("", "salth1", "base", ""),
            ("salt", "", "base", ""),
            ("sal", "t", "base", ""),
            ("sa", "lt", "base", ""),
            ("", "a", "base", "h1"),
            ("a", "", "base", "h1"),
        ]
    ):
        *names, adapter = parts
        changes = [(0, adapter)] if adapter else []
        root = root_of(*names)
        assert start(kv, f"root {index}", list(range(12)), root=root, changes=changes) == 0
    root = root_of("", "salt", "base")
    assert start(kv, "z", list(range(12)), root=root, changes=[(0, "h1")]) == 2


def test_disabled_cache_shares_nothing() -> None:
    kv = Cache(enable_prefix_caching=False)
    start(kv, "a", list(range(9)))
    assert start(kv, "b", list(range(9))) == 0
    kv.release("a")
    kv.release("b")
    assert kv.num_idle == 0
    check(kv)


def test_integrity_check_finds_a_page_shared_by_mistake() -> None:
    kv = make()
    start(kv, "a", list(range(9)), computed=0)
    start(kv, "b", list(range(100, 109)), computed=0)
    stolen = kv.page_ids("a")[0]
    kv.blocks.share(stolen)
    kv.blocks.release(kv.page_ids("b")[0])
    kv.page_ids("b")[0] = stolen
    with pytest.raises(IntegrityError, match="shared but not a prefix block"):
        kv.check_integrity()


def test_integrity_check_finds_a_block_of_another_content() -> None:
    kv = make()
    start(kv, "a", list(range(9)))
    start(kv, "b", list(range(100, 109)))
    pages_a, pages_b = kv.page_ids("a"), kv.page_ids("b")
    pages_a[0], pages_b[0] = pages_b[0], pages_a[0]
    with pytest.raises(IntegrityError, match="other tokens"):
        kv.check_integrity()


def test_one_request_has_one_table() -> None:
    kv = make()
    start(kv, "a", [1])
    with pytest.raises(IntegrityError, match="already has a page table"):
        kv.open("a", BlockChain(b"", BLOCK), [])


def test_chain_extended_in_parts_equals_chain_at_once() -> None:
    token_ids = array("i", range(40))
    at_once, in_parts = BlockChain(b"r", BLOCK), BlockChain(b"r", BLOCK)
    at_once.extend(token_ids, 10)
    for count in (1, 1, 4, 3, 10):
        in_parts.extend(token_ids, count)
    assert in_parts.hashes == at_once.hashes
    assert len(set(at_once.hashes)) == 10


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_random_traffic_hits_what_it_should(data: st.DataObject) -> None:
    """Against a model: the set of (root, token prefix) whose block is computed and not evicted."""
    kv = make(24)
    open_requests: dict[int, list[int]] = {}
    content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # page -> what was computed there
    for request_id in range(data.draw(st.integers(1, 25))):
        for old in [r for r in open_requests if data.draw(st.booleans())]:
            kv.release(old)
            del open_requests[old]
            check(kv)
        root = data.draw(st.sampled_from([b"r1", b"r2"]))
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=16))
        chain = BlockChain(root, BLOCK)
        prefix = kv.find_prefix(chain, array("i", tokens)).page_ids
        for block, page_id in enumerate(prefix):
            assert content[page_id] == (root, tuple(tokens[: (block + 1) * BLOCK]))
        kv.open(request_id, chain, prefix)
        missing = kv.num_pages_for(len(tokens)) - len(prefix)
        while kv.blocks.num_free < missing and (found := kv.first_idle()):
            kv.evict(found[1])
        if kv.blocks.num_free < missing:
            kv.release(request_id)
            continue
        kv.grow(request_id, len(tokens))
        for block, page_id in enumerate(kv.page_ids(request_id)):
            content[page_id] = (root, tuple(tokens[: (block + 1) * BLOCK]))
        kv.register(request_id, array("i", tokens), data.draw(st.integers(0, len(tokens))))
        open_requests[request_id] = tokens
        check(kv)
    for old in open_requests:
        kv.release(old)
    check(kv)
    assert kv.blocks.num_free + kv.blocks.num_owned(Owner.PREFIX) == 23
