import pytest

from loraplex.memory.accounting.adapter_cache import AdapterCache
from loraplex.memory.accounting.block_manager import BlockManager, IntegrityError
from loraplex.memory.accounting.eviction import LOAD_FIXED_NS, EvictionClock


class Cache(AdapterCache):
    """An adapter cache with a pool of its own."""

    def __init__(self, max_slots: int = 3) -> None:
        self.blocks = BlockManager(16)
        super().__init__(self.blocks, EvictionClock(), max_slots)


def make(max_slots: int = 3) -> Cache:
    return Cache(max_slots)


def check(cache: Cache) -> None:
    cache.check_integrity()
    cache.blocks.check_integrity(cache.claims())


def load(cache: Cache, content_hash: str, num_pages: int, now: float) -> None:
    cache.allocate(content_hash, num_pages, now)
    cache.finish_load(content_hash, now)
    check(cache)


def test_life_of_an_adapter() -> None:
    cache = make()
    adapter = cache.allocate("h", 4, 1.0)
    assert adapter.is_loading
    assert not adapter.is_idle
    assert len(set(adapter.page_ids)) == 4
    check(cache)
    cache.reserve("h")
    cache.finish_load("h", 2.0)
    assert cache.num_idle == 0
    cache.reserve("h")
    cache.unreserve("h", 3.0)
    assert cache.num_idle_pages == 0
    cache.unreserve("h", 4.0)
    assert (cache.num_idle, cache.num_idle_pages) == (1, 4)
    assert adapter.last_use == 4.0
    assert cache.first_idle() == ((LOAD_FIXED_NS // 4, 1), "h")
    check(cache)
    cache.reserve("h")
    with pytest.raises(IntegrityError, match="loading or reserved"):
        cache.evict("h")
    cache.unreserve("h", 5.0)
    assert cache.evict("h") == adapter.slot
    assert cache.get("h") is None
    assert cache.num_free_slots == 3
    check(cache)


def test_idle_adapters_are_offered_cheapest_a_page_first() -> None:
    cache = make()
    for name, num_pages, num_bytes in (("a", 1, 0), ("b", 2, 0), ("c", 4, 500_000_000)):
        cache.allocate(name, num_pages, 0.0, num_bytes=num_bytes)
        cache.finish_load(name, 0.0)
        check(cache)
    order = []
    while (found := cache.first_idle()) is not None:
        order.append(found[1])
        cache.evict(found[1])
        check(cache)
    assert order == ["b", "a", "c"]  # 0.5, 1 and 2.75 ms a page
    assert cache.num_idle_pages == 0


def test_loading_adapter_stays_until_its_load_is_answered() -> None:
    cache = make()
    cache.allocate("h", 4, 1.0)
    assert (cache.num_idle, cache.num_idle_pages, cache.first_idle()) == (0, 0, None)
    with pytest.raises(IntegrityError, match="loading or reserved"):
        cache.evict("h")
    check(cache)
    cache.finish_load("h", 2.0)
    assert cache.num_idle_pages == 4
    cache.evict("h")
    check(cache)


def test_failed_load_frees_slot_and_pages() -> None:
    cache = make()
    cache.allocate("h", 4, 1.0)
    cache.reserve("h")
    with pytest.raises(IntegrityError, match="reserved"):
        cache.fail_load("h")
    cache = make()
    cache.allocate("h", 4, 1.0)
    cache.fail_load("h")
    assert cache.get("h") is None
    assert (cache.num_free_slots, cache.blocks.num_free) == (3, 15)
    check(cache)


def test_misuse_is_refused() -> None:
    cache = make(max_slots=1)
    load(cache, "h", 1, 0.0)
    with pytest.raises(IntegrityError, match="already has pages"):
        cache.allocate("h", 1, 0.0)
    with pytest.raises(IntegrityError, match="no adapter slot"):
        cache.allocate("other", 1, 0.0)
    with pytest.raises(IntegrityError, match="no reservation"):
        cache.unreserve("h", 0.0)
    with pytest.raises(IntegrityError, match="not loading"):
        cache.finish_load("h", 0.0)


def test_integrity_check_finds_a_slot_used_twice_and_wrong_idleness() -> None:
    cache = make()
    load(cache, "h", 2, 0.0)
    load(cache, "other", 2, 0.0)
    other = cache.get("other")
    assert other is not None
    other.slot = 0
    with pytest.raises(IntegrityError, match="slot"):
        cache.check_integrity()
    cache = make()
    load(cache, "h", 2, 0.0)
    adapter = cache.get("h")
    assert adapter is not None
    adapter.num_reservations = 1
    with pytest.raises(IntegrityError, match="exactly the idle adapters"):
        cache.check_integrity()
