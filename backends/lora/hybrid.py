"""Backend ``hybrid`` of op ``lora``: BGMV for steps of few rows, SGMV for steps of many.

BGMV is the faster one up to 256 rows, the most that were measured
(benchmarks/results/lora_kernels_h200.jsonl); where it ceases to be is not known yet.
"""

import torch

from loraplex.backends.lora.contract import LoRABatch, LoRAGroup, LoRAOp, LoRASpec, LoRATable

MAX_BGMV_ROWS = 512
"""Rows with an adapter up to which BGMV runs. A guess above 256."""


class HybridLoRA:
    name = "hybrid"

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """None when usable, else the reason: it needs both of its halves."""
        try:
            from loraplex.backends.lora.cupy_bgmv import CupyBGMV
            from loraplex.backends.lora.triton_sgmv import TritonSGMV
        except ImportError as error:
            return f"it needs both cupy and triton: {error}"
        return CupyBGMV.probe(spec) or TritonSGMV.probe(spec)

    def __init__(self, spec: LoRASpec) -> None:
        from loraplex.backends.lora.cupy_bgmv import CupyBGMV
        from loraplex.backends.lora.triton_sgmv import TritonSGMV

        self._few: LoRAOp = CupyBGMV(spec)
        self._many: LoRAOp = TritonSGMV(spec)
        self._op: LoRAOp = self._few
        self.graph_kinds = self._few.graph_kinds
        self.max_graph_rows = min(self._few.max_graph_rows, MAX_BGMV_ROWS)

    @property
    def family(self) -> str:
        return self._op.family

    def kind_of(self, batch: LoRABatch) -> str:
        return self._choose(batch).kind_of(batch)

    def plan(self, *, table: LoRATable, batch: LoRABatch, kind: str | None = None) -> None:
        self._op = self._choose(batch)
        self._op.plan(table=table, batch=batch, kind=kind)

    def _choose(self, batch: LoRABatch) -> LoRAOp:
        return self._few if batch.num_tokens <= MAX_BGMV_ROWS else self._many

    def shrink(
        self, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        self._op.shrink(x=x, pool=pool, layer=layer, group=group, table=table)

    def expand(
        self, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        self._op.expand(y=y, pool=pool, layer=layer, group=group, table=table)
