"""Adds the vectors of adapters, those of DoRA and of biases, to any backend of op ``lora``.

The vectors follow `expand` in a launch of their own. Batches without vectors get the plans, the
kernels and the graphs of the wrapped backend, unchanged. Batches with vectors have graphs of kinds
of their own, whose names end in SUFFIX. They are rare: the worker captures them for few sizes, and
for all groups of projections alone.
"""

from dataclasses import dataclass
from typing import Any

import torch

from loraplex.backends.lora.contract import (
    GraphKindError,
    LoRABatch,
    LoRAGroup,
    LoRAOp,
    LoRAPlan,
    LoRASpec,
    LoRATable,
)
from loraplex.backends.lora.touched import ATTENTION
from loraplex.backends.lora.vectors.contract import VectorKernels, has_vectors, vector_rows

SUFFIX = "+vectors"


def _rare(kind: str) -> str:
    return kind.removesuffix(ATTENTION) + SUFFIX


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """A LoRAPlan of a batch with vectors."""

    lora: LoRAPlan
    vectors: Any  # of VectorKernels

    @property
    def kind(self) -> str:
        return _rare(self.lora.kind)

    @property
    def family(self) -> str:
        return self.lora.family


class VectorLoRA:
    """A LoRAOp.

    Attributes:
        graph_kinds: the wrapped backend's.
        rare_kinds: those for batches with vectors, which `plan_graph` takes, too.
    """

    def __init__(self, lora: LoRAOp[Any], vectors: VectorKernels) -> None:
        self._lora = lora
        self._vectors = vectors
        self.name = lora.name
        self.graph_kinds = lora.graph_kinds
        self.rare_kinds = tuple(dict.fromkeys(map(_rare, lora.graph_kinds)))
        self.max_graph_rows = lora.max_graph_rows

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        kind = self._lora.kind_of(table=table, batch=batch)
        return _rare(kind) if has_vectors(table, batch) else kind

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> LoRAPlan:
        plan: LoRAPlan = self._lora.plan(table=table, batch=batch)
        if not has_vectors(table, batch):
            return plan
        return VectorPlan(plan, self._vectors.plan(table, vector_rows(table, batch)))

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> LoRAPlan:
        if kind not in self.graph_kinds + self.rare_kinds:
            raise GraphKindError(self.name, kind, self.graph_kinds + self.rare_kinds)
        plan: LoRAPlan = self._lora.plan_graph(
            table=table, batch=batch, kind=kind.removesuffix(SUFFIX)
        )
        if not kind.endswith(SUFFIX):
            return plan
        return VectorPlan(plan, self._vectors.plan_graph(table, vector_rows(table, batch)))

    def shrink(
        self, plan: LoRAPlan, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        lora_plan = plan.lora if isinstance(plan, VectorPlan) else plan
        self._lora.shrink(lora_plan, x=x, pool=pool, layer=layer, group=group)

    def expand(
        self, plan: LoRAPlan, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        if not isinstance(plan, VectorPlan):
            self._lora.expand(plan, y=y, pool=pool, layer=layer, group=group)
            return
        self._lora.expand(plan.lora, y=y, pool=pool, layer=layer, group=group)
        self._vectors.apply(plan.vectors, y=y, pool=pool, layer=layer, group=group)


def rare_kinds(lora: LoRAOp[Any]) -> tuple[str, ...]:
    """Returns the kinds of graphs of an op that few steps need."""
    return lora.rare_kinds if isinstance(lora, VectorLoRA) else ()


def make_vector_lora(lora: LoRAOp[Any], spec: LoRASpec) -> VectorLoRA:
    """Wraps a backend, with kernels for the spec's device."""
    if spec.device.type == "cuda":
        from loraplex.backends.lora.vectors.triton_vectors import TritonVectors

        return VectorLoRA(lora, TritonVectors(spec))
    from loraplex.backends.lora.vectors.torch_vectors import TorchVectors

    return VectorLoRA(lora, TorchVectors())
