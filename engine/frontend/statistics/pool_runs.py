"""Writes a map of the page pool as runs of equal cells."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from loraplex.engine.ipc.messages.pool_map import PoolMap
from loraplex.memory.accounting.block_manager import Owner

_ADAPTER = int(Owner.ADAPTER)
FIRST_ADAPTER_CODE = _ADAPTER
"""Code of adapter slot 0. Smaller codes are those of Owner: free, KV in use, idle prefix block."""


def pool_runs(pool: PoolMap) -> list[int]:
    """Returns code, number of cells, code, number of cells and so on, in order of page ids."""
    codes = [
        FIRST_ADAPTER_CODE + slot if owner == _ADAPTER else owner
        for owner, slot in zip(pool.owners, pool.adapter_slots, strict=True)
    ]
    runs: list[int] = []
    for code, cells in groupby(codes):
        runs += (code, sum(1 for _ in cells))
    return runs


def describe_pools(pools: Iterable[PoolMap]) -> list[dict[str, Any]]:
    """Returns the maps as plain values for a client."""
    return [
        {
            "engine": pool.engine,
            "num_pages": pool.num_pages,
            "pages_per_cell": pool.pages_per_cell,
            "runs": pool_runs(pool),
        }
        for pool in pools
    ]
