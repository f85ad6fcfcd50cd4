"""A map of the page pool: the tenant of every page, or of a sample of the pages."""

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.worker_protocol import Int32Array, Record

MAX_POOL_CELLS = 8192
"""Bounds the time that a map takes from planning, however large the pool is."""


class PoolMap(Record):
    """Cells in order of page ids. Each cell shows the first of the pages that it stands for."""

    num_pages: int  # that tenants can own
    pages_per_cell: int
    owners: bytes  # [cells] Owner
    adapter_slots: Int32Array  # [cells]; means something only where the owner is ADAPTER
    engine: str = ""  # of a cluster


def map_pool(memory: PageManager, max_cells: int) -> PoolMap:
    """Returns a map of at most `max_cells` cells, which must be positive."""
    num_pages = memory.blocks.num_usable
    step = -(-num_pages // min(max_cells, MAX_POOL_CELLS))
    return PoolMap(
        num_pages=num_pages,
        pages_per_cell=step,
        owners=memory.blocks.owners_of_every(step),
        adapter_slots=memory.adapters.slots_of_every(step),
    )
