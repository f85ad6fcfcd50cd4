"""What TritonSGMV launches: its two kernels, prepared once a group, layer, regime and strides."""

from dataclasses import dataclass
from typing import Any

import torch

from loraplex.backends.launch.triton import TritonLaunch
from loraplex.backends.lora.contract import LoRAGroup, LoRATable
from loraplex.backends.lora.sgmv.blocks import ExpandBlocks, Regime, ShrinkBlocks
from loraplex.backends.lora.sgmv.kernels import expand_kernel, shrink_kernel

HEADER_INTS = 16
"""A group's fields in the metadata; kernels/sgmv.py numbers them."""


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """How one group runs in one regime."""

    regime: tuple[Regime, int]
    group: LoRAGroup
    index: int  # of the group's header in the metadata
    shrink: ShrinkBlocks
    expand: ExpandBlocks
    item_ranks: int
    max_rank: int
    max_splits: int
    num_blocks: int  # of columns, over all modules
    # What a launch has at most, whatever the batch.
    row_items: int  # of shrink, for each row
    shrink_programs: int
    expand_programs: int


class SGMVLaunches:
    """Adds what does not change to the arguments of shrink and expand.

    Args:
        v: float32 scratch, written by shrink and read by expand.
        meta: int32, what `TritonSGMV.plan` uploads.
        order_at: where the order of tokens starts in it.
        pdl: programmatic dependent launch, of Hopper and later.
    """

    def __init__(
        self, *, v: torch.Tensor, meta: torch.Tensor, order_at: int, page_elems: int, pdl: bool
    ) -> None:
        self._v = v
        self._meta = meta
        self._common: dict[str, Any] = {"ORDER_AT": order_at, "PAGE": page_elems, "PDL": pdl}
        if pdl:
            self._common["launch_pdl"] = True
        self._table: LoRATable | None = None
        self._pool: torch.Tensor | None = None
        self._shrinks: dict[tuple[object, ...], TritonLaunch] = {}
        self._expands: dict[tuple[object, ...], TritonLaunch] = {}

    def shrink(
        self,
        num_programs: int,
        blocks: GroupBlocks,
        *,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        table: LoRATable,
    ) -> None:
        if table is not self._table or pool is not self._pool:
            self._take(pool, table)
        key = (blocks.regime, blocks.index, layer, x.stride()[0])
        launch = self._shrinks.get(key)
        if launch is None:
            launch = self._shrinks[key] = self._prepare_shrink(blocks, layer, x, pool, table)
        launch(num_programs, x)

    def expand(
        self,
        num_programs: int,
        blocks: GroupBlocks,
        *,
        y: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        table: LoRATable,
    ) -> None:
        if table is not self._table or pool is not self._pool:
            self._take(pool, table)
        key = (blocks.regime, blocks.index, layer, y.stride()[0])
        launch = self._expands.get(key)
        if launch is None:
            launch = self._expands[key] = self._prepare_expand(blocks, layer, y, pool, table)
        launch(num_programs, y)

    def _take(self, pool: torch.Tensor, table: LoRATable) -> None:
        """Launches keep the addresses and strides of one table and one pool."""
        self._shrinks.clear()
        self._expands.clear()
        self._table, self._pool = table, pool

    def _prepare_shrink(
        self,
        blocks: GroupBlocks,
        layer: int,
        x: torch.Tensor,
        pool: torch.Tensor,
        table: LoRATable,
    ) -> TritonLaunch:
        group = blocks.group
        return TritonLaunch(
            shrink_kernel,
            (layer, x.stride(0), pool.stride(0), *_strides(table)),
            (self._v, pool, self._meta, table.page_table, table.rank, table.a_start),
            HEADER=HEADER_INTS * blocks.index, FIRST_MODULE=group.modules[0],
            NUM_MODULES=len(group.modules), K=group.in_features,
            BLOCK_M=blocks.shrink.rows, BLOCK_R=blocks.item_ranks,
            num_warps=blocks.shrink.warps, num_stages=blocks.shrink.stages, **self._common,
        )  # fmt: skip

    def _prepare_expand(
        self,
        blocks: GroupBlocks,
        layer: int,
        y: torch.Tensor,
        pool: torch.Tensor,
        table: LoRATable,
    ) -> TritonLaunch:
        group = blocks.group
        outs = (*group.out_features, 0, 0)
        starts = (*group.out_starts, 0, 0)
        return TritonLaunch(
            expand_kernel,
            (layer, y.stride(0), pool.stride(0), *_strides(table)),
            (self._v, pool, self._meta, table.page_table, table.rank, table.b_start, table.scale),
            HEADER=HEADER_INTS * blocks.index, FIRST_MODULE=group.modules[0],
            NUM_MODULES=len(group.modules), OUT_0=outs[0], OUT_1=outs[1], OUT_2=outs[2],
            START_1=starts[1], START_2=starts[2], MAX_SPLITS=blocks.max_splits,
            BLOCK_M=blocks.expand.rows, BLOCK_N=blocks.expand.columns,
            BLOCK_R=blocks.expand.ranks, MAX_RANK=blocks.max_rank,
            num_warps=blocks.expand.warps, num_stages=1, maxnreg=blocks.expand.max_registers,
            **self._common,
        )  # fmt: skip


def _strides(table: LoRATable) -> tuple[int, int, int, int]:
    """Of the page table, and from one layer, slot and module to the next in rank and its like."""
    rank = table.rank
    return table.page_table.stride(0), rank.stride(0), rank.stride(2), rank.stride(1)
