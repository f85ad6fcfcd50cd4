"""The contract of the kernels behind vectors/op.py: the gains and shifts of adapters."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from loraplex.backends.lora.contract import Int32Array, LoRABatch, LoRAGroup, LoRATable


@dataclass(frozen=True, slots=True)
class VectorRows:
    """The rows of a batch whose adapters have vectors, and their adapter slots."""

    rows: Int32Array
    slots: Int32Array

    @property
    def is_empty(self) -> bool:
        return not len(self.rows)


class VectorKernels(Protocol):
    """Computes y[t, n] = gain[s, n] * y[t, n] + shift[s, n] in fp32, rounded once.

    A plan stays valid until it is dropped; one of `plan_graph` until the next of them. Their memory
    is as in LoRAOp.
    """

    def plan(self, table: LoRATable, rows: VectorRows) -> Any: ...

    def plan_graph(self, table: LoRATable, rows: VectorRows) -> Any:
        """Returns a plan in static memory. What `apply` launches depends on the rows of y alone."""
        ...

    def apply(
        self, plan: Any, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        """Change y [T, sum of out_features] in place."""
        ...


def has_vectors(table: LoRATable, batch: LoRABatch) -> bool:
    """Returns whether an adapter of the batch has vectors."""
    return bool(table.host_has_vectors.numpy()[batch.segment_slots].any())


def vector_rows(table: LoRATable, batch: LoRABatch) -> VectorRows:
    slots = np.repeat(batch.segment_slots, np.diff(batch.segment_starts))
    there = table.host_has_vectors.numpy()[slots]
    return VectorRows(batch.token_order[there], slots[there])
