"""Launches of the two SGMV kernels, prepared once for each group, layer, regime and strides."""

from dataclasses import dataclass
from typing import Any

import torch

from loraplex.backends.launch.buffers import PooledBuffer
from loraplex.backends.launch.triton import TritonLaunch
from loraplex.backends.lora.contract import LoRAGroup, LoRASpec, LoRATable
from loraplex.backends.lora.sgmv.blocks import ExpandBlocks, Regime, ShrinkBlocks
from loraplex.backends.lora.sgmv.kernels import expand_kernel, shrink_kernel

HEADER_INTS = 16
"""A group's fields in the metadata; kernels.py numbers them."""
KIND = "sgmv"


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
    # Upper bounds of a launch, whatever the batch.
    row_items: int  # of shrink, for each row
    shrink_programs: int
    expand_programs: int


@dataclass(frozen=True, slots=True)
class SGMVPlan:
    """A LoRAPlan."""

    table: LoRATable
    meta: torch.Tensor  # int32 on the device, read by kernels.py
    launches: dict[int, tuple[GroupBlocks, int, int]]
    """For more than max_graph_rows rows: by a group's first module its blocks and the programs of
    shrink and expand, 0 for a group without work. Empty in a plan for graphs."""
    buffer: PooledBuffer | None  # owns `meta`; None: it is static

    @property
    def kind(self) -> str:
        return KIND

    @property
    def family(self) -> str:
        return "sgmv"


class SGMVLaunches:
    """Launches shrink and expand, keeping the arguments that stay between calls.

    Args:
        spec: of the op.
        v: float32 scratch, written by shrink and read by expand.
        order_at: where the order of tokens starts in a plan's metadata.
        pdl: programmatic dependent launch, which Hopper and later GPUs have.
    """

    def __init__(self, spec: LoRASpec, *, v: torch.Tensor, order_at: int, pdl: bool) -> None:
        self._spec = spec
        self._v = v
        self._common: dict[str, Any] = {
            "ORDER_AT": order_at, "PAGE": spec.page_elems * spec.packing, "ALIGN": spec.row_align,
            "PDL": pdl,
        }  # fmt: skip
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
        plan: SGMVPlan,
        *,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
    ) -> None:
        table = plan.table
        if table is not self._table or pool is not self._pool:
            self._forget(pool, table)
        key = (blocks.regime, blocks.index, layer, x.stride()[0])
        launch = self._shrinks.get(key)
        if launch is None:
            launch = self._shrinks[key] = self._prepare_shrink(blocks, layer, x, pool, table)
        launch(num_programs, x, plan.meta)

    def expand(
        self,
        num_programs: int,
        blocks: GroupBlocks,
        plan: SGMVPlan,
        *,
        y: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
    ) -> None:
        table = plan.table
        if table is not self._table or pool is not self._pool:
            self._forget(pool, table)
        key = (blocks.regime, blocks.index, layer, y.stride()[0])
        launch = self._expands.get(key)
        if launch is None:
            launch = self._expands[key] = self._prepare_expand(blocks, layer, y, pool, table)
        launch(num_programs, y, plan.meta)

    def _forget(self, pool: torch.Tensor, table: LoRATable) -> None:
        """Drop all launches: they keep the addresses and strides of one table and one pool."""
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
        group, pool = blocks.group, self._spec.weights_in(pool)
        return TritonLaunch(
            shrink_kernel,
            (layer, x.stride(0), pool.stride(0), *_strides(table)),
            (self._v, pool, table.page_table, table.rank, table.a_start),
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
        group, pool = blocks.group, self._spec.weights_in(pool)
        outs = (*group.out_features, 0, 0)
        starts = (*group.out_starts, 0, 0)
        return TritonLaunch(
            expand_kernel,
            (layer, y.stride(0), pool.stride(0), *_strides(table)),
            (self._v, pool, table.page_table, table.rank, table.b_start, table.scale),
            HEADER=HEADER_INTS * blocks.index, FIRST_MODULE=group.modules[0],
            NUM_MODULES=len(group.modules), OUT_0=outs[0], OUT_1=outs[1], OUT_2=outs[2],
            START_1=starts[1], START_2=starts[2], MAX_SPLITS=blocks.max_splits,
            BLOCK_M=blocks.expand.rows, BLOCK_N=blocks.expand.columns,
            BLOCK_R=blocks.expand.ranks, MAX_RANK=blocks.max_rank,
            num_warps=blocks.expand.warps, num_stages=1, maxnreg=blocks.expand.max_registers,
            **self._common,
        )  # fmt: skip


def _strides(table: LoRATable) -> tuple[int, int, int, int]:
    """Returns the page table's row stride, then rank's strides of layer, slot and module."""
    rank = table.rank
    return table.page_table.stride(0), rank.stride(0), rank.stride(2), rank.stride(1)
