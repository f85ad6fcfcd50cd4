"""The contract of op ``lora``: what every backend computes, over weights in the page pool.

Semantics, for every module m of the group, every row t with s = token_slots[t] >= 0 and
rank[layer, m, s] > 0::

    y[t, out_m] += scale[layer, m, s] * (x[t] @ A[s].T) @ B[s].T

with A[s] of shape [rank, in_features] and B[s] of shape [out_features, rank], read in place
from the pool. The product x A is accumulated in fp32 and y is rounded once. All other rows
of y are left as they are, bit for bit.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

ROW_ALIGN = 64
"""Rows of weights start at multiples of this many elements; equals memory.adapter_layout's."""


def row_stride(num_features: int) -> int:
    """Elements from one row of weights to the next."""
    return -(-num_features // ROW_ALIGN) * ROW_ALIGN


@dataclass(frozen=True, slots=True)
class LoRASpec:
    """Static sizes of one worker, by which a backend sizes its scratch memory."""

    max_num_tokens: int  # rows of the largest step
    max_rank: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class LoRAGroup:
    """Projections that read one input and write one fused output (q|k|v, o, gate|up, down)."""

    modules: tuple[int, ...]  # module ids, in the order of the output's columns
    in_features: int
    out_starts: tuple[int, ...]  # first column of each module in y
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoRATable:
    """The resident adapters, L layers, M modules, S adapter slots; filled by loads, in place.

    An adapter's weights of one layer are one virtual array over its pages (see
    memory/adapter_layout.py): element e is pool[layer, page_table[s, e // page_elems],
    e % page_elems]. Row i of A starts at a_start + i * stride(in_features), row i of B
    transposed at b_start + i * stride(out_features), the stride rounded up to ROW_ALIGN.
    """

    page_table: torch.Tensor  # int32 [S, max pages of an adapter]
    rank: torch.Tensor  # int32 [L, M, S]; 0: the adapter leaves the module alone
    a_start: torch.Tensor  # int32 [L, M, S]
    b_start: torch.Tensor  # int32 [L, M, S]
    scale: torch.Tensor  # float32 [L, M, S]
    host_page_table: torch.Tensor  # the same five on the CPU
    host_rank: torch.Tensor
    host_a_start: torch.Tensor
    host_b_start: torch.Tensor
    host_scale: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoRABatch:
    """Which adapter each row of a step uses. Built once a step on the CPU, used by every layer.

    Rows are grouped by adapter: segment i is `token_order[starts[i] : starts[i + 1]]`, all of
    adapter slot `segment_slots[i]`, rows in ascending order. Base rows are in no segment.
    """

    num_tokens: int
    token_slots: torch.Tensor  # int32 [num_tokens] on the device, -1 for the base model
    token_order: torch.Tensor  # int64 [rows with an adapter] on the device
    segment_starts: tuple[int, ...]  # len(segment_slots) + 1
    segment_slots: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return not self.segment_slots


class LoRAOp(Protocol):
    """One backend, made once a worker with a LoRASpec. `apply` neither allocates nor syncs."""

    name: str

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> None:
        """Prepare what all layers of the step share. Called before `apply`, once a step."""
        ...

    def apply(
        self,
        *,
        y: torch.Tensor,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
        table: LoRATable,
        batch: LoRABatch,
    ) -> None:
        """Add the adapters' part to y, in place.

        Args:
            y: [T, sum of out_features], the base model's output, rows contiguous; mutated.
            x: [T, in_features], y's dtype.
            pool: [L, num_pages, page_elems], the whole page pool, y's dtype.
            layer: index into the first axis of pool and table.
        """
        ...
