import pytest

from loraplex.memory.accounting.adapter_cache import AdapterCache, Residency
from loraplex.memory.accounting.block_manager import BlockManager, IntegrityError
from loraplex.memory.accounting.eviction import LOAD_FIXED_NS, EvictionClock


def make(num_pages: int = 16, max_slots: int = 3) -> AdapterCache:
    return AdapterCache(BlockManager(num_pages), EvictionClock(), max_slots)


def check(cache: AdapterCache) -> None:
    cache.check_integrity()
    cache._blocks.check_integrity(cache.claims())


def load(cache: AdapterCache, content_hash: str, num_pages: int, now: float) -> None:
    cache.allocate(content_hash, num_pages, now)
    cache.finish_load(content_hash, now)
    check(cache)


def test_life_of_an_adapter() -> None:
    cache = make()
    adapter = cache.allocate("h", 4, 1.0)
    assert adapter.residency is Residency.LOADING
    assert not adapter.is_idle
    assert len(set(adapter.page_ids)) == 4
    check(cache)
    cache.pin("h")
    cache.finish_load("h", 2.0)
    assert cache.num_idle == 0
    cache.pin("h")
    cache.unpin("h", 3.0)
    assert cache.num_idle_pages == 0
    cache.unpin("h", 4.0)
    assert (cache.num_idle, cache.num_idle_pages) == (1, 4)
    assert adapter.last_use == 4.0
    assert cache.first_idle() == ((LOAD_FIXED_NS // 4, 1), "h")
    check(cache)
    cache.pin("h")
    with pytest.raises(IntegrityError, match="pinned"):
        cache.release("h")
    cache.unpin("h", 5.0)
    assert cache.release("h") == adapter.slot
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
        cache.release(found[1])
        check(cache)
    assert order == ["b", "a", "c"]  # 0.5, 1 and 2.75 ms a page
    assert cache.num_idle_pages == 0


def test_loading_adapter_is_not_idle_but_a_failed_load_gives_all_back() -> None:
    cache = make()
    cache.allocate("h", 4, 1.0)
    assert cache.num_idle == 0
    cache.release("h")
    assert cache.num_free_slots == 3
    check(cache)


def test_misuse_is_refused() -> None:
    cache = make(max_slots=1)
    load(cache, "h", 1, 0.0)
    with pytest.raises(IntegrityError, match="already has pages"):
        cache.allocate("h", 1, 0.0)
    with pytest.raises(IntegrityError, match="no adapter slot"):
        cache.allocate("other", 1, 0.0)
    with pytest.raises(IntegrityError, match="without a pin"):
        cache.unpin("h", 0.0)
    with pytest.raises(IntegrityError, match="not loading"):
        cache.finish_load("h", 0.0)


def test_integrity_check_finds_a_lost_slot_and_wrong_idleness() -> None:
    cache = make()
    load(cache, "h", 2, 0.0)
    cache._free_slots.pop()
    with pytest.raises(IntegrityError, match="slot"):
        cache.check_integrity()
    cache = make()
    load(cache, "h", 2, 0.0)
    adapter = cache.get("h")
    assert adapter is not None
    adapter.num_pins = 1
    with pytest.raises(IntegrityError, match="idle in one book"):
        cache.check_integrity()
