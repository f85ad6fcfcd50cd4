"""Backend ``hybrid`` of op ``lora``: BGMV for few rows an adapter, SGMV for many.

BGMV reads the weights faster and starts sooner. SGMV spends less on each row. Where they cross
depends on rows, rows an adapter and ranks (benchmarks/results/lora_kernels_h200.jsonl). A plan is
the plan of the half that runs the batch.
"""

from typing import Any

import torch

from loraplex.backends.lora.contract import (
    LoRABatch,
    LoRAGroup,
    LoRAOp,
    LoRAPlan,
    LoRASpec,
    LoRATable,
    check_graph_batch,
)
from loraplex.backends.lora.sgmv.blocks import RANK_CLASSES

SGMV_STEP_ROWS = 129
"""SGMV runs from this many rows with an adapter on..."""
SGMV_ROWS = 12
"""...and this many rows an adapter, on average, if no rank passes the first class."""
SGMV_ROWS_LARGE_RANKS = 28
"""The same if a rank does, and only in steps above max_graph_rows: in a graph SGMV takes the ranks
in blocks of the first class."""


class HybridLoRA:
    name = "hybrid"

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """Returns None when usable, else the reason. It needs both of its halves."""
        try:
            from loraplex.backends.lora.bgmv.cupy_bgmv import CupyBGMV
            from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV
        except ImportError as error:
            return f"it needs both cupy and triton: {error}"
        return CupyBGMV.probe(spec) or TritonSGMV.probe(spec)

    def __init__(
        self, spec: LoRASpec, halves: tuple[LoRAOp[Any], LoRAOp[Any]] | None = None
    ) -> None:
        """`halves` are the ops for few and for many rows an adapter; None makes them."""
        self._few, self._many = halves or _make_halves(spec)
        self.graph_kinds = (*self._few.graph_kinds, *self._many.graph_kinds)
        self.max_graph_rows = min(self._few.max_graph_rows, self._many.max_graph_rows)

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        return self._choose(table, batch).kind_of(table=table, batch=batch)

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> LoRAPlan:
        return self._choose(table, batch).plan(table=table, batch=batch)

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> LoRAPlan:
        check_graph_batch(self, batch, kind)
        op = self._few if kind in self._few.graph_kinds else self._many
        return op.plan_graph(table=table, batch=batch, kind=kind)

    def shrink(
        self, plan: LoRAPlan, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        op = self._few if plan.kind in self._few.graph_kinds else self._many
        op.shrink(plan, x=x, pool=pool, layer=layer, group=group)

    def expand(
        self, plan: LoRAPlan, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        op = self._few if plan.kind in self._few.graph_kinds else self._many
        op.expand(plan, y=y, pool=pool, layer=layer, group=group)

    def _choose(self, table: LoRATable, batch: LoRABatch) -> LoRAOp[Any]:
        num_rows, num_adapters = len(batch.token_order), len(batch.segment_slots)
        if num_rows < max(SGMV_STEP_ROWS, SGMV_ROWS * num_adapters):
            return self._few
        if table.host_rank.numpy()[:, :, batch.segment_slots].max() <= RANK_CLASSES[0]:
            return self._many
        is_long = batch.num_tokens > self.max_graph_rows
        is_many = is_long and num_rows >= SGMV_ROWS_LARGE_RANKS * num_adapters
        return self._many if is_many else self._few


def _make_halves(spec: LoRASpec) -> tuple[LoRAOp[Any], LoRAOp[Any]]:
    from loraplex.backends.lora.bgmv.cupy_bgmv import CupyBGMV
    from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV

    return CupyBGMV(spec), TritonSGMV(spec)
