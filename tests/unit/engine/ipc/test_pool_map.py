"""The map of the pool, against what the tenants of the pages claim."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.ipc.messages.pool_map import MAX_POOL_CELLS, map_pool
from loraplex.memory.accounting.block_chain import BlockChain, prefix_root
from loraplex.memory.accounting.block_manager import Owner
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.worker_protocol import int_array

ROOT = prefix_root(tenant="", salt="", base_fingerprint="base")


def make_memory(num_pages: int) -> PageManager:
    return PageManager(
        num_pages=num_pages,
        block_tokens=4,
        max_adapter_slots=8,
        enable_prefix_caching=True,
        unload=lambda slot: None,
    )


def claimed(memory: PageManager) -> dict[int, tuple[int, int | None]]:
    """Returns owner and adapter slot of every page that has one."""
    found: dict[int, tuple[int, int | None]] = {
        page_id: (int(owner), None) for page_id, owner, _ in memory.kv.claims()
    }
    for adapter in memory.adapters:
        found |= {page_id: (int(Owner.ADAPTER), adapter.slot) for page_id in adapter.page_ids}
    return found


def shown(memory: PageManager, max_cells: int) -> Iterator[tuple[int, int | None]]:
    found = map_pool(memory, max_cells)
    for owner, slot in zip(found.owners, found.adapter_slots, strict=True):
        yield owner, slot if owner == Owner.ADAPTER else None


def act(memory: PageManager, number: int, kind: int, size: int) -> None:
    """Loads or evicts an adapter, or starts or ends a request whose blocks stay cached."""
    if kind == 0 and memory.adapters.num_free_slots and size <= memory.num_free:
        memory.adapters.allocate(f"h{number}", size, 0.0)
        memory.adapters.finish_load(f"h{number}", 0.0)
    elif kind == 1 and (first := memory.adapters.first_idle()):
        memory.evict_adapter(first[1])
    elif kind == 2 and size <= memory.num_free:
        tokens = int_array([number * 100 + i for i in range(4 * size)])
        memory.kv.open(number, BlockChain(ROOT, 4), [])
        memory.kv.grow(number, 4 * size)
        memory.kv.register(number, tokens, 4 * size)
    elif kind == 3 and (open_ids := list(memory.kv.request_ids())):
        memory.kv.release(open_ids[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=40))
def test_each_page_is_shown_as_its_tenant_claims_it(actions: list[tuple[int, int]]) -> None:
    memory = make_memory(50)
    for number, (kind, size) in enumerate(actions):
        act(memory, number, kind, size)
        memory.check_integrity()
    claims = claimed(memory)
    expected = [claims.get(page_id, (int(Owner.FREE), None)) for page_id in range(1, 50)]
    assert list(shown(memory, 100)) == expected
    for max_cells in (1, 7, 48):
        step = map_pool(memory, max_cells).pages_per_cell
        assert list(shown(memory, max_cells)) == expected[::step]
        assert len(expected[::step]) <= max_cells


@pytest.mark.parametrize("num_pages", [2, 8193, 8194, 100_001])
def test_a_map_is_bounded_and_covers_all_pages(num_pages: int) -> None:
    found = map_pool(make_memory(num_pages), 10**9)
    assert found.num_pages == num_pages - 1
    assert len(found.owners) == len(found.adapter_slots) <= MAX_POOL_CELLS
    last = 1 + (len(found.owners) - 1) * found.pages_per_cell
    assert last < num_pages <= last + found.pages_per_cell
