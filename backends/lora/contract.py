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

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]

ROW_ALIGN = 64
"""Rows of weights start at multiples of this many elements; equals memory.adapter_layout's."""


def row_stride(num_features: int) -> int:
    """Elements from one row of weights to the next."""
    return -(-num_features // ROW_ALIGN) * ROW_ALIGN


@dataclass(frozen=True, slots=True)
class LoRAGroup:
    """Projections that read one input and write one fused output (q|k|v, o, gate|up, down)."""

    modules: tuple[int, ...]  # consecutive module ids, in the order of the output's columns
    in_features: int
    out_starts: tuple[int, ...]  # first column of each module in y
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoRASpec:
    """Static sizes of one worker, by which a backend sizes its scratch and compiles its kernels."""

    max_num_tokens: int  # rows of the largest step
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    page_elems: int
    groups: tuple[LoRAGroup, ...]  # every group that `apply` will be called with


@dataclass(frozen=True, slots=True)
class LoRATable:
    """The resident adapters, L layers, M modules, S adapter slots; filled by loads, in place.

    An adapter's weights of one layer are one virtual array over its pages (see
    memory/adapter_layout.py): element e is pool[layer, page_table[s, e // page_elems],
    e % page_elems]. Row i of A starts at a_start + i * stride(in_features), row i of B
    transposed at b_start + i * stride(out_features), the stride rounded up to ROW_ALIGN.

    The fields [L, M, S] on the device have the same strides, whatever these are; best, an
    adapter's modules lie side by side, so that one read brings a layer's.
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
    """Which adapter each row of a step uses: built once a step, on the CPU.

    Rows are grouped by adapter: segment i is `token_order[starts[i] : starts[i + 1]]`, all of
    adapter slot `segment_slots[i]`, rows in ascending order. Base rows are in no segment.
    """

    num_tokens: int
    token_order: Int32Array  # [rows with an adapter]
    segment_starts: Int32Array  # [number of segments + 1]
    segment_slots: Int32Array  # [number of segments]

    @property
    def is_empty(self) -> bool:
        return not len(self.segment_slots)


class LoRAOp(Protocol):
    """One backend, made once a worker with a LoRASpec. Shrink and expand neither allocate nor sync.

    `plan` uploads what it needs of the batch from pinned memory, without a sync, into memory that
    later plans overwrite in stream order.

    A batch has a kind. What is launched depends on the planned kind and on the number of rows of x
    and y alone, as long as that is at most `max_graph_rows`: what was captured after a plan of one
    kind may be replayed after any later plan of that kind, of no more rows. Rows of y that the
    batch does not name are left alone.

    Attributes:
        graph_kinds: all there are; none: nothing must be captured.
        family: the kernels of the last plan, for the stats: "bgmv", "sgmv" or "bmm".
    """

    name: str
    graph_kinds: tuple[str, ...]
    max_graph_rows: int

    @property
    def family(self) -> str: ...

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        """The kind that suits a batch best; where nothing must be captured, none of them."""
        ...

    def plan(self, *, table: LoRATable, batch: LoRABatch, kind: str | None = None) -> None:
        """Prepare what all layers of the step share. Called before them, once a step.

        Args:
            kind: None for an eager step. Before a capture the kind to capture, with an empty
                batch; before a replay the kind of the graph, `kind_of`.
        """
        ...

    def shrink(
        self, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        """Of the planned batch, what depends on x alone. It may run before the base model's
        product, or beside it on a second stream that expand then waits for.

        Args:
            x: [T, in_features], of the spec's dtype, rows contiguous. T is at least the batch's
                num_tokens. Kept as it is until expand of the same group has run.
            pool: [L, num_pages, page_elems], the whole page pool, x's dtype.
            layer: index into the first axis of pool and table.
            group: one of the spec's.
        """
        ...

    def expand(
        self, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        """Add the adapters' part to y, in place; follows shrink of the same layer and group.

        Args:
            y: [T, sum of out_features], the base model's output, rows contiguous; mutated.
        """
        ...


def apply_lora(
    op: LoRAOp,
    *,
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    group: LoRAGroup,
    table: LoRATable,
) -> None:
    """Both halves, one after the other."""
    op.shrink(x=x, pool=pool, layer=layer, group=group, table=table)
    op.expand(y=y, pool=pool, layer=layer, group=group, table=table)
