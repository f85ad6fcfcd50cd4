"""The ways of managing memory that only a benchmark uses, to compare with the product's."""

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters import prefetch
from loraplex.scheduler.config import SchedulerConfig

import memory_variants as variants
from sim_result import SimRequest, SimResult
from simulator import simulate

NUM_PAGES = 20


def memory_of(make: object, max_adapter_slots: int = 2) -> PageManager:
    assert callable(make)
    memory = make(
        num_pages=NUM_PAGES,
        block_tokens=16,
        max_adapter_slots=max_adapter_slots,
        enable_prefix_caching=True,
        unload=lambda slot: None,
    )
    assert isinstance(memory, PageManager)
    return memory


def load(memory: PageManager, name: str, num_pages: int, num_bytes: int = 0) -> None:
    memory.adapters.allocate(name, num_pages, 0.0, num_bytes=num_bytes)
    memory.adapters.finish_load(name, 0.0)


def test_lru_evicts_what_became_idle_first_whatever_it_costs() -> None:
    memory = memory_of(variants.lru_page_manager)
    load(memory, "expensive", 2, num_bytes=80_000_000)
    load(memory, "cheap", 2)
    memory.adapters.set_on_host("expensive", True)
    first = memory.adapters.first_idle()
    assert first is not None
    assert first[1] == "expensive"
    memory.make_room(NUM_PAGES - 3)
    assert [adapter.content_hash for adapter in memory.adapters] == ["cheap"]
    memory.check_integrity()


def test_fixed_slots_keep_idle_adapters_however_short_kv_is() -> None:
    memory = memory_of(variants.FixedSlotsPageManager)
    for name in "ab":
        load(memory, name, 0)
    assert memory.num_available == NUM_PAGES - 1
    assert memory.make_room(NUM_PAGES - 1)
    assert len(memory.adapters) == 2
    assert memory.make_adapter_slot()
    assert [adapter.content_hash for adapter in memory.adapters] == ["b"]
    memory.check_integrity()


def run(num_slots: int) -> SimResult:
    """Five requests for five adapters come at once, and take most of the pool each."""
    trace = [SimRequest(0.0, 100, 20, adapter) for adapter in range(5)]
    return simulate(
        trace,
        config=SchedulerConfig(),
        num_pages=NUM_PAGES,
        adapter_pages=lambda adapter: 4,
        max_adapter_slots=num_slots or 1024,
        page_manager=variants.FixedSlotsPageManager if num_slots else PageManager,
        share_pool=not num_slots,
    )


def test_simulation_serves_all_over_either_pool() -> None:
    shared, one_slot, own_slots = (run(num_slots) for num_slots in (0, 1, 5))
    for result in (shared, one_slot, own_slots):
        assert result.num_new_tokens == 5 * 20
        assert result.num_loads >= 5
    assert max(one_slot.step_adapters) == 1
    assert max(own_slots.step_adapters) == 2  # KV of 19 pages holds two requests
    assert own_slots.num_loads == 5


def test_no_prefetch_ends_with_its_block() -> None:
    before = prefetch.MAX_LOADS
    with variants.no_prefetch():
        assert prefetch.MAX_LOADS == 0
    assert before == prefetch.MAX_LOADS > 0
