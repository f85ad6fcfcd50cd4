"""Backend ``hybrid`` of op ``lora``: BGMV for few rows an adapter, SGMV for many.

BGMV reads the weights faster and starts sooner, SGMV spends less on each row. Where they cross
depends on rows, rows an adapter and ranks (benchmarks/results/lora_kernels_h200.jsonl).
"""

import torch

from loraplex.backends.lora.contract import LoRABatch, LoRAGroup, LoRAOp, LoRASpec, LoRATable
from loraplex.backends.lora.sgmv.blocks import RANK_CLASSES

SGMV_ROWS = 12
"""Rows an adapter, on average, from which SGMV runs..."""
SGMV_STEP_ROWS = 129
"""...if so many rows of the step have an adapter, none of a rank above the first class..."""
SGMV_ROWS_LARGE_RANKS = 28
"""...else from so many rows an adapter on, in steps beyond max_graph_rows alone: in a graph SGMV
takes the ranks of the first class at a time."""


class HybridLoRA:
    name = "hybrid"

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """None when usable, else the reason: it needs both of its halves."""
        try:
            from loraplex.backends.lora.bgmv.cupy_bgmv import CupyBGMV
            from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV
        except ImportError as error:
            return f"it needs both cupy and triton: {error}"
        return CupyBGMV.probe(spec) or TritonSGMV.probe(spec)

    def __init__(self, spec: LoRASpec) -> None:
        from loraplex.backends.lora.bgmv.cupy_bgmv import CupyBGMV
        from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV

        self._few: LoRAOp = CupyBGMV(spec)
        self._many: LoRAOp = TritonSGMV(spec)
        self._op: LoRAOp = self._few
        self.graph_kinds = (*self._few.graph_kinds, *self._many.graph_kinds)
        self.max_graph_rows = min(self._few.max_graph_rows, self._many.max_graph_rows)

    @property
    def family(self) -> str:
        return self._op.family

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        return self._choose(table, batch).kind_of(table=table, batch=batch)

    def plan(self, *, table: LoRATable, batch: LoRABatch, kind: str | None = None) -> None:
        if kind is not None:
            self._op = self._few if kind in self._few.graph_kinds else self._many
        else:
            self._op = self._choose(table, batch)
        self._op.plan(table=table, batch=batch, kind=kind)

    def shrink(
        self, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        self._op.shrink(x=x, pool=pool, layer=layer, group=group, table=table)

    def expand(
        self, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        self._op.expand(y=y, pool=pool, layer=layer, group=group, table=table)

    def _choose(self, table: LoRATable, batch: LoRABatch) -> LoRAOp:
        num_rows, num_adapters = len(batch.token_order), len(batch.segment_slots)
        if num_rows < max(SGMV_STEP_ROWS, SGMV_ROWS * num_adapters):
            return self._few
        if table.host_rank.numpy()[:, :, batch.segment_slots].max() <= RANK_CLASSES[0]:
            return self._many
        is_long = batch.num_tokens > self.max_graph_rows
        is_many = is_long and num_rows >= SGMV_ROWS_LARGE_RANKS * num_adapters
        return self._many if is_many else self._few
