"""One eviction policy over both tenants, against a naive model of the same policy."""

import random
from array import array
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.memory.accounting.block_chain import BlockChain
from loraplex.memory.accounting.block_manager import Owner
from loraplex.memory.accounting.eviction import (
    LOAD_FIXED_NS,
    EvictionClock,
    EvictionQueue,
    Priority,
    load_cost_ns,
    recompute_cost_ns,
)
from loraplex.memory.accounting.page_manager import PageManager

BLOCK, NUM_PAGES, MAX_SLOTS = 16, 20, 3


def test_costs_are_those_of_the_constants() -> None:
    assert load_cost_ns(0, on_host=True) == load_cost_ns(0, on_host=False) == LOAD_FIXED_NS
    assert load_cost_ns(84_000_000, on_host=True) == 2_680_000  # 84 MB: 1.68 ms over the link
    assert load_cost_ns(84_000_000, on_host=False) == 14_680_000  # and 12 ms to read
    assert recompute_cost_ns(16) == 400_000


def test_stamp_is_the_floor_and_the_cost_of_a_page() -> None:
    clock = EvictionClock()
    assert clock.stamp(1000, 4) == (250, 1)
    clock.advance((100, 7))
    assert clock.stamp(1000, 4) == (350, 2)
    clock.advance((50, 8))  # an adapter that gave up its slot was not the lowest of all
    assert clock.stamp(0, 1) == (100, 3)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5)), max_size=120))
def test_heap_offers_the_least_of_what_is_in(steps: list[tuple[str, int]]) -> None:
    heap, model = EvictionQueue(), dict[str, Priority]()
    for number, (key, cost) in enumerate(steps):
        if key in model:
            assert heap.remove(key) == model.pop(key)
        else:
            model[key] = (cost, number)
            heap.add(key, model[key])
        assert (len(heap), set(heap)) == (len(model), set(model))
        assert heap.first() == min(((p, k) for k, p in model.items()), default=None)
        assert len(heap._heap) <= 2 * len(model) + 17


def test_something_dear_outlives_something_cheap_but_not_for_ever() -> None:
    """One large block of KV goes after another until the adapter is older than they are dear."""
    memory = make_memory()
    memory.adapters.allocate("dear", 2, 0.0)  # 0.5 ms a page, a block 0.4
    memory.adapters.finish_load("dear", 0.0)
    survived = 0
    while memory.adapters.get("dear"):
        tokens = array("i", [survived] * BLOCK * 3)
        memory.make_room(17)
        memory.kv.open(
            survived, chain := BlockChain(b"", BLOCK), memory.kv.find_prefix(chain, tokens).page_ids
        )
        memory.kv.grow(survived, len(tokens))
        memory.kv.register(survived, tokens, len(tokens))
        memory.kv.release(survived)
        memory.check_integrity()
        survived += 1
        assert survived < 20
    assert survived > 1


def test_what_the_host_store_lost_outlives_what_it_has() -> None:
    memory = make_memory()
    for name in ("lost", "kept"):
        memory.adapters.allocate(name, 2, 0.0, num_bytes=80_000_000)
        memory.adapters.set_on_host(name, True)
        memory.adapters.finish_load(name, 0.0)
    memory.adapters.set_on_host("lost", False)
    first = memory.adapters.first_idle()
    assert first is not None and first[1] == "kept"
    memory.adapters.set_on_host("lost", True)
    first = memory.adapters.first_idle()
    assert first is not None and first[1] == "lost", "it fell idle first"


def make_memory() -> PageManager:
    return PageManager(
        num_pages=NUM_PAGES,
        block_tokens=BLOCK,
        max_adapter_slots=MAX_SLOTS,
        enable_prefix_caching=True,
        unload=lambda slot: None,
    )


@dataclass
class NaivePolicy:
    """Lists and minima over all that is idle; told of each change, it predicts each victim."""

    floor: int = 0
    time: int = 0
    idle: dict[str | int, tuple[int, int, int]] = field(default_factory=dict)  # stamp, time, pages
    num_evicted: Counter[str] = field(default_factory=Counter)

    def add(self, key: str | int, cost_ns: int, num_pages: int) -> None:
        self.time += 1
        stamp = self.floor + cost_ns // num_pages
        self.idle[key] = (stamp, self.time, num_pages)

    def evict(self, among: list[str | int]) -> int:
        victim = min(among, key=self.idle.__getitem__)
        stamp, _, num_pages = self.idle.pop(victim)
        self.num_evicted["adapter" if isinstance(victim, str) else "block"] += 1
        self.floor = max(self.floor, stamp)
        return num_pages

    def dearer(self, key: str | int, by_ns: int) -> None:
        """By so much a page."""
        stamp, time, num_pages = self.idle[key]
        self.idle[key] = (stamp + by_ns, time, num_pages)

    def make_room(self, num_missing: int) -> None:
        while num_missing > 0:
            num_missing -= self.evict(list(self.idle))


class Traffic:
    """Both tenants on one pool, drawn by hypothesis; the naive model follows what happened."""

    def __init__(self) -> None:
        self.memory = make_memory()
        self.naive = NaivePolicy()
        self.num_requests = 0
        self.requests: list[int] = []
        self.reserved: list[str] = []
        self.num_bytes: dict[str, int] = {}
        self.on_host: set[str] = set()
        self.parents: dict[bytes, bytes] = {}

    def run(self, tokens: list[int]) -> None:
        """A request whose blocks are computed at once."""
        kv = self.memory.kv
        token_ids = array("i", [token for token in tokens for _ in range(BLOCK)] + [0])
        chain = BlockChain(b"r", BLOCK)
        prefix = kv.find_prefix(chain, token_ids).page_ids
        num_missing = kv.num_pages_for(len(token_ids)) - len(prefix)
        if self.memory.num_available - kv.num_idle_among(prefix) < num_missing:
            return
        self.num_requests += 1
        for page_id in prefix:
            self.naive.idle.pop(page_id, None)
        kv.open(self.num_requests, chain, prefix)
        self.make_room(num_missing)
        kv.grow(self.num_requests, len(token_ids))
        kv.register(self.num_requests, token_ids, len(token_ids))
        self.requests.append(self.num_requests)
        self.parents |= dict(zip(chain.hashes[1:], chain.hashes, strict=False))

    def close(self, index: int) -> None:
        if self.requests:
            request_id = self.requests.pop(index % len(self.requests))
            page_ids = list(self.memory.kv.page_ids(request_id))
            self.memory.kv.release(request_id)
            for page_id in reversed(page_ids):
                if self.memory.blocks.owner(page_id) is Owner.PREFIX:
                    self.naive.add(page_id, 25_000 * BLOCK, 1)

    def load(self, name: str, num_pages: int, num_megabytes: int) -> None:
        memory = self.memory
        if memory.adapters.get(name) or memory.num_available < num_pages:
            return
        if not memory.has_adapter_slot:
            return
        if not memory.adapters.num_free_slots:
            self.naive.evict([key for key in self.naive.idle if isinstance(key, str)])
        assert memory.make_adapter_slot()
        self.make_room(num_pages)
        self.num_bytes[name] = num_megabytes * 1_000_000
        memory.adapters.allocate(name, num_pages, 0.0, num_bytes=self.num_bytes[name])

    def adapter_idle(self, name: str) -> None:
        adapter = self.memory.adapters.get(name)
        assert adapter is not None
        if adapter.is_idle:
            self.naive.add(name, self.cost_ns(name), len(adapter.page_ids))

    def cost_ns(self, name: str) -> int:
        disk_ns = 0 if name in self.on_host else self.num_bytes[name] // 7
        return 1_000_000 + self.num_bytes[name] // 50 + disk_ns

    def move_host_copy(self, name: str) -> None:
        """Into the host store, or out of it."""
        adapter = self.memory.adapters.get(name)
        num_pages = len(adapter.page_ids) if adapter else 1
        before = self.cost_ns(name) // num_pages if adapter else 0
        self.on_host ^= {name}
        self.memory.adapters.set_on_host(name, name in self.on_host)
        if name in self.naive.idle:
            self.naive.dearer(name, self.cost_ns(name) // num_pages - before)

    def finish_loads(self) -> None:
        for adapter in list(self.memory.adapters):
            if adapter.is_loading:
                self.memory.adapters.finish_load(adapter.content_hash, 0.0)
                self.adapter_idle(adapter.content_hash)

    def reserve(self, name: str) -> None:
        if self.memory.adapters.get(name):
            self.naive.idle.pop(name, None)
            self.memory.adapters.reserve(name)
            self.reserved.append(name)

    def unreserve(self, index: int) -> None:
        if self.reserved:
            name = self.reserved.pop(index % len(self.reserved))
            self.memory.adapters.unreserve(name, 0.0)
            self.adapter_idle(name)

    def make_room(self, num_pages: int) -> None:
        if num_pages <= self.memory.num_available:
            self.naive.make_room(num_pages - self.memory.num_free)
            assert self.memory.make_room(num_pages)

    def make_room_below(self, num_pages: int, cost_us: int) -> None:
        """Only what is cheaper goes, lowest first, and nothing more than needed."""
        memory, naive = self.memory, self.naive
        stamp = naive.floor + cost_us * 1000
        below = (stamp, 1 << 60)  # a stamp given now is later than all
        missing = num_pages - memory.num_free
        has_room = num_pages <= memory.num_available
        while has_room and missing > 0:
            has_room = min(naive.idle.values())[0] <= stamp
            if has_room:
                missing -= naive.evict(list(naive.idle))
        assert memory.make_room(num_pages, below=below) == has_room

    def check(self) -> None:
        memory = self.memory
        memory.check_integrity()
        idle = {a.content_hash for a in memory.adapters if a.is_idle} | set(memory.kv._idle)
        assert idle == set(self.naive.idle), "something else was evicted than the policy says"
        assert all(memory.adapters.get(name) for name in self.reserved)
        cached = memory.kv._page_of
        assert all(self.parents[key] in cached for key in cached if key in self.parents)


@pytest.mark.parametrize("seed", range(12))
def test_evicts_what_the_naive_policy_evicts(seed: int) -> None:
    rng, traffic = random.Random(seed), Traffic()
    for _ in range(300):
        name, index = rng.choice("abcde"), rng.randrange(6)
        match rng.choices(range(9), (8, 6, 4, 4, 1, 2, 0.3, 1, 1))[0]:
            case 0:
                traffic.run([rng.randrange(3) for _ in range(rng.randrange(6))])
            case 1:
                traffic.close(index)
            case 2:
                traffic.load(name, rng.randint(1, 6), rng.randrange(100))
            case 3:
                traffic.finish_loads()
            case 4:
                traffic.reserve(name)
            case 5:
                traffic.unreserve(index)
            case 6:
                traffic.make_room(rng.randrange(NUM_PAGES))
            case 7:
                traffic.make_room_below(rng.randrange(NUM_PAGES), rng.randrange(1000))
            case 8:
                traffic.move_host_copy(name)
        traffic.check()
    assert traffic.naive.num_evicted["adapter"] > 5
    assert traffic.naive.num_evicted["block"] > 20
