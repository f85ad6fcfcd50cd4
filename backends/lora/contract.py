"""The contract of op ``lora``: what every backend computes, over weights in the page pool.

Semantics, for every module m of the group, every row t with s = token_slots[t] >= 0 and
rank[layer, m, s] > 0::

    y[t, out_m] += scale[layer, m, s] * (x[t] @ A[s].T) @ B[s].T

with A[s] of shape [rank, in_features] and B[s] of shape [out_features, rank], read in place
from the pool, where they have the model's dtype or are in e4m3. The product x A is accumulated in
fp32 and y is rounded once. All other rows of y keep every bit.

Adapters may have a gain and a shift for a module besides: one number for each output feature. Then

    y[t, out_m] = gain[s] * y[t, out_m] + shift[s]

follows, rounded once more. The backends leave it to vectors/op.py, which wraps each of them.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LoRAGroup:
    """Projections that read one input and write one fused output (q|k|v, o, gate|up, down)."""

    modules: tuple[int, ...]  # consecutive module ids, in the order of the output's columns
    in_features: int
    out_starts: tuple[int, ...]  # first column of each module in y
    out_features: tuple[int, ...]
    row_align: int  # rows start at multiples of this many elements

    def row_stride(self, num_features: int) -> int:
        """Returns the elements from one row in the model's dtype to the next."""
        return -(-num_features // self.row_align) * self.row_align


@dataclass(frozen=True, slots=True)
class LoRASpec:
    """Static sizes of one worker. Backends size their buffers and compile their kernels by them."""

    max_num_tokens: int  # rows of the largest step
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    page_elems: int
    groups: tuple[LoRAGroup, ...]  # every group that shrink and expand will be called with
    weight_dtype: torch.dtype | None = None  # of A and B in pages: e4m3, or None: `dtype`

    @property
    def packing(self) -> int:
        """Numbers of A and B in an element of a page."""
        return self.dtype.itemsize // (self.weight_dtype or self.dtype).itemsize

    @property
    def row_align(self) -> int:
        """Rows of A and B start at multiples of this many numbers. It is equal in all groups."""
        return self.groups[0].row_align * self.packing

    def row_stride(self, num_features: int) -> int:
        """Returns the numbers from one row of A or B to the next."""
        return -(-num_features // self.row_align) * self.row_align

    def weights_in(self, pages: torch.Tensor) -> torch.Tensor:
        """Returns a view of pages, [..., elements], as numbers of A and B."""
        return pages if self.weight_dtype is None else pages.view(self.weight_dtype)


@dataclass(frozen=True, slots=True)
class LoRATable:
    """The resident adapters: L layers, M modules, S adapter slots. Loads fill it in place.

    An adapter's weights of one layer are one virtual array over its pages (see
    memory/adapter_layout.py): element e is pool[layer, page_table[s, e // page_elems],
    e % page_elems]. Row i of A starts at a_start + i * stride(in_features). Row i of B
    transposed starts at b_start + i * stride(out_features). See LoRASpec.row_stride. If A and B are
    in e4m3, all of this holds for the pool as LoRASpec.weights_in shows it, and their own scale is
    in `scale`. A gain or a shift is the sum of two rows, each of out_features, with the stride of
    LoRAGroup.row_stride.

    The LoRA fields on the device have equal strides, and any strides are allowed. The fastest
    layout is that of table_fields.py.
    """

    page_table: torch.Tensor  # int32 [S, max pages of an adapter]
    rank: torch.Tensor  # int32 [L, M, S]; 0: the adapter leaves the module alone
    a_start: torch.Tensor  # int32 [L, M, S]
    b_start: torch.Tensor  # int32 [L, M, S]
    scale: torch.Tensor  # float32 [L, M, S]
    gain_start: torch.Tensor  # int32 [L, M, S]; 0: the module has no gain. Other strides than rank
    shift_start: torch.Tensor  # int32 [L, M, S]; 0: the module has no shift. Strides of gain_start
    host_page_table: torch.Tensor  # the same seven on the CPU
    host_rank: torch.Tensor
    host_a_start: torch.Tensor
    host_b_start: torch.Tensor
    host_scale: torch.Tensor
    host_gain_start: torch.Tensor
    host_shift_start: torch.Tensor
    host_has_vectors: torch.Tensor  # bool [S]: some module has a gain or a shift


@dataclass(frozen=True, slots=True)
class LoRABatch:
    """The adapter of each row of a step. Built once a step, on the CPU.

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


class LoRAPlan(Protocol):
    """A batch prepared by one op, for one table. Only that op reads what else it holds.

    Attributes:
        kind: the batch's kind, see `LoRAOp.kind_of`; of a graph plan the kind it was made for.
        family: the kernels it launches, for the stats: "bgmv", "sgmv" or "bmm".
    """

    @property
    def kind(self) -> str: ...

    @property
    def family(self) -> str: ...


Plan = TypeVar("Plan", bound=LoRAPlan)


PlanIn = TypeVar("PlanIn", bound=LoRAPlan, contravariant=True)


class LoRAKernels(Protocol[PlanIn]):
    """The part of an op that every layer calls, see LoRAOp."""

    def shrink(
        self, plan: PlanIn, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        """Compute x A for the planned batch.

        It needs x alone, so it may run before the base model's product, or beside it on a second
        stream that expand then waits for.

        Args:
            x: [T, in_features], of the spec's dtype, rows contiguous. T is at least the batch's
                num_tokens. Must not change until expand of the same group has run.
            pool: [L, num_pages, page_elems], the whole page pool, x's dtype.
            layer: index into the first axis of pool and table.
            group: one of the spec's.
        """
        ...

    def expand(
        self, plan: PlanIn, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        """Add the adapters' part to y, in place, after shrink of the same plan, layer and group.

        Args:
            y: [T, sum of out_features], the base model's output, rows contiguous; mutated.
        """
        ...


class LoRAOp(LoRAKernels[Plan], Protocol[Plan]):
    """One backend, made once a worker with a LoRASpec.

    The op keeps nothing of a batch: a plan holds it. Plans, shrink, expand and replays of graphs
    run on one stream, or on streams that wait for each other. Shrink and expand neither allocate
    device memory nor sync, but in backend ``torch``.

    Lifetime of plans:

    - A plan of `plan` owns its device memory until it is dropped. Any number may be alive, and
      they may run in any order.
    - A plan of `plan_graph` refers to static buffers of the op, one set for each kind, which the
      graphs of that kind read. The next `plan_graph` of the kind overwrites them in stream order,
      so one graph plan of each kind is alive at a time.
    - The product x A between shrink and expand lies in scratch memory of the op. The expand of a
      shrink comes before the op's next shrink, of whatever plan.

    Graphs. What shrink and expand of a graph plan launch depends on its kind and on the number of
    rows of x and y alone, as long as that number is at most `max_graph_rows`. So a graph captured
    with one plan of a kind may be replayed after any later `plan_graph` of that kind, for a batch
    of no more rows. Rows of y that the batch does not name keep every bit.

    Attributes:
        graph_kinds: all kinds that `plan_graph` takes; empty if nothing may be captured.
    """

    name: str
    graph_kinds: tuple[str, ...]
    max_graph_rows: int

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        """Returns the kind that runs a batch fastest. It is one of `graph_kinds`, if there are any.

        The choice of a graph needs it before anything is planned. It reads the CPU's fields alone.
        """
        ...

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> Plan:
        """Prepare what all layers of an eager step share. Call it once a step, before the layers.

        It uploads from page-locked memory, without a sync.
        """
        ...

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> Plan:
        """Prepare a step for the graphs of `kind`, in the static buffers of that kind.

        Before a capture the batch is empty. Before a replay `kind` is `kind_of` the batch.

        Raises:
            GraphKindError: `kind` is none of `graph_kinds`.
            ValueError: the batch has more than `max_graph_rows` rows.
        """
        ...


def apply_lora(
    op: LoRAKernels[Any],
    plan: LoRAPlan,
    *,
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    group: LoRAGroup,
) -> None:
    """Shrink, then expand."""
    op.shrink(plan, x=x, pool=pool, layer=layer, group=group)
    op.expand(plan, y=y, pool=pool, layer=layer, group=group)


class GraphKindError(ValueError):
    """Raised by `plan_graph` for a kind that the op has no graphs of."""

    def __init__(self, name: str, kind: str, kinds: tuple[str, ...]) -> None:
        super().__init__(
            f"lora backend {name!r} has no graphs of kind {kind!r}; "
            f"it has {', '.join(kinds) or 'none'}"
        )


def check_graph_batch(op: LoRAOp[Any], batch: LoRABatch, kind: str) -> None:
    """Raises the errors of `LoRAOp.plan_graph`."""
    if kind not in op.graph_kinds:
        raise GraphKindError(op.name, kind, op.graph_kinds)
    if batch.num_tokens > op.max_graph_rows:
        raise ValueError(
            f"a batch of {batch.num_tokens} rows does not fit the graphs of lora backend "
            f"{op.name!r}, which take {op.max_graph_rows}"
        )
