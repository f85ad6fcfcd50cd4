"""Backend ``torch`` of op ``lora``: torch.bmm over weights gathered from the pages. Runs anywhere.

Segments whose adapters have the same ranks in a layer have the same layout and form a bucket.
A bucket's weights are gathered from the pages once and multiplied in one batch. All arithmetic is
fp32. Scratch memory comes from torch's caching allocator.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.contract import (
    GraphKindError,
    LoRABatch,
    LoRAGroup,
    LoRASpec,
    LoRATable,
)

MAX_BUCKET_SEGMENTS = 32
"""Bounds the memory of the gathered weights."""
MAX_PADDED_ROWS = 16
"""A longer segment gets a bucket of its own: it is not padded and does not pad others."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Ranks and starts of every module in one layer, shared by the segments of a bucket."""

    rank: tuple[int, ...]
    a_start: tuple[int, ...]
    b_start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _HostBucket:
    """n segments of one layout, padded to m rows each, before the upload."""

    layout: _Layout
    arrays: dict[str, np.ndarray]  # slots, padded_rows, rows and, with padding, valid
    first_page: int
    num_consecutive: int


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A _HostBucket with its tensors on the device."""

    layout: _Layout
    pages: torch.Tensor  # int32 [n, pages of an adapter]
    scale: torch.Tensor  # float32 [layers, modules, n, 1, 1]
    padded_rows: torch.Tensor  # int32 [n * m], rows of x; padding repeats a segment's last row
    rows: torch.Tensor  # int64 [rows that are no padding]
    valid: torch.Tensor | None  # int32, where `rows` lie in the padded ones; None: no padding
    first_page: int  # where the only segment's consecutive pages begin
    num_consecutive: int  # pages from there that are the adapter's first ones; 0 if n > 1


KIND = "bmm"


@dataclass(slots=True)
class TorchLoRAPlan:
    """A LoRAPlan."""

    layers: list[list[_Bucket]]  # empty: no row has an adapter
    x: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the last shrink
    kind: str = KIND

    @property
    def family(self) -> str:
        return "bmm"


class TorchLoRA:
    name = "torch"
    graph_kinds: tuple[str, ...] = ()
    max_graph_rows = 0

    def __init__(self, spec: LoRASpec) -> None:
        self._spec = spec
        self._uploader = Uploader(spec.device)

    @classmethod
    def probe(cls, spec: LoRASpec | None = None) -> str | None:
        return None

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        return KIND

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> TorchLoRAPlan:
        if batch.is_empty:
            return TorchLoRAPlan([])
        fields = (table.host_rank, table.host_a_start, table.host_b_start)
        places = np.stack(
            [field.numpy()[:, :, batch.segment_slots] for field in fields], axis=1
        )  # [layers, 3, modules, segments]
        keys = [of_layer.tobytes() for of_layer in places]
        planned = {
            key: _plan_layer(of_layer, table, batch)
            for key, of_layer in dict(zip(keys, places, strict=True)).items()
        }
        uploaded = self._upload(planned, table)
        return TorchLoRAPlan([uploaded[key] for key in keys])

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> TorchLoRAPlan:
        raise GraphKindError(self.name, kind, self.graph_kinds)

    def shrink(
        self,
        plan: TorchLoRAPlan,
        *,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        """Keep x for expand, which does all the work."""
        plan.x = x

    def expand(
        self,
        plan: TorchLoRAPlan,
        *,
        y: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        for bucket in plan.layers[layer] if plan.layers else ():
            if any(bucket.layout.rank[module] for module in group.modules):
                weights = self._spec.weights_in(pool[layer])
                _apply_bucket(y, plan.x, weights, self._spec, layer, group, bucket)

    def _upload(
        self, planned: dict[bytes, list[_HostBucket]], table: LoRATable
    ) -> dict[bytes, list[_Bucket]]:
        """Upload all buckets' arrays in one copy."""
        buckets = [bucket for of_layer in planned.values() for bucket in of_layer]
        arrays = {
            f"{name} {index}": array
            for index, bucket in enumerate(buckets)
            for name, array in bucket.arrays.items()
        }
        tensors = self._uploader.upload(arrays)
        made = iter(
            _Bucket(
                layout=bucket.layout,
                pages=table.page_table.index_select(0, tensors[f"slots {index}"]),
                scale=table.scale.index_select(2, tensors[f"slots {index}"])[..., None, None],
                padded_rows=tensors[f"padded_rows {index}"],
                rows=tensors[f"rows {index}"],
                valid=tensors.get(f"valid {index}"),
                first_page=bucket.first_page,
                num_consecutive=bucket.num_consecutive,
            )
            for index, bucket in enumerate(buckets)
        )
        return {key: [next(made) for _ in of_layer] for key, of_layer in planned.items()}


def _plan_layer(places: np.ndarray, table: LoRATable, batch: LoRABatch) -> list[_HostBucket]:
    """Returns the buckets of a layer; `places` is [rank | a_start | b_start, modules, segments]."""
    members: dict[tuple[bytes, int], list[int]] = {}
    lengths = np.diff(batch.segment_starts)
    for segment, length in enumerate(lengths.tolist()):
        alone = length > MAX_PADDED_ROWS
        size_class = -1 - segment if alone else (length - 1).bit_length()
        members.setdefault((places[:, :, segment].tobytes(), size_class), []).append(segment)
    planned = []
    for segments in members.values():
        layout = _Layout(*(tuple(row) for row in places[:, :, segments[0]].tolist()))
        for start in range(0, len(segments), MAX_BUCKET_SEGMENTS):
            part = segments[start : start + MAX_BUCKET_SEGMENTS]
            planned.append(_make_bucket(layout, part, lengths[part], table, batch))
    return planned


def _make_bucket(
    layout: _Layout,
    segments: list[int],
    lengths: np.ndarray,
    table: LoRATable,
    batch: LoRABatch,
) -> _HostBucket:
    column = np.arange(lengths.max())
    starts = batch.segment_starts[segments]
    padded = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
    padded_rows = batch.token_order[padded.ravel()]
    is_valid = (column < lengths[:, None]).ravel()
    slots = batch.segment_slots[segments]
    arrays = {
        "slots": slots,
        "padded_rows": padded_rows,
        "rows": padded_rows[is_valid].astype(np.int64),
    }
    if not is_valid.all():
        arrays["valid"] = np.flatnonzero(is_valid).astype(np.int32)
    host_pages = table.host_page_table[int(slots[0])].numpy()
    steps = np.diff(host_pages) == 1
    num_consecutive = 1 + int(steps.size if steps.all() else steps.argmin())
    return _HostBucket(
        layout=layout,
        arrays=arrays,
        first_page=int(host_pages[0]),
        num_consecutive=num_consecutive if len(segments) == 1 else 0,
    )


def _apply_bucket(
    y: torch.Tensor,
    x: torch.Tensor,
    pool_layer: torch.Tensor,
    spec: LoRASpec,
    layer: int,
    group: LoRAGroup,
    bucket: _Bucket,
) -> None:
    num_segments, layout = bucket.pages.shape[0], bucket.layout
    weights, base = _gather_weights(pool_layer, spec, group, bucket)
    x32 = x.index_select(0, bucket.padded_rows).float().view(num_segments, -1, group.in_features)
    for module, column, width in zip(
        group.modules, group.out_starts, group.out_features, strict=True
    ):
        rank = layout.rank[module]
        if rank == 0:
            continue
        a = _matrix(spec, weights, layout.a_start[module] - base, rank, group.in_features)
        b = _matrix(spec, weights, layout.b_start[module] - base, rank, width)
        shrunk = torch.bmm(x32, a.transpose(1, 2)).mul_(bucket.scale[layer, module])
        delta = torch.bmm(shrunk, b).view(-1, width)
        if bucket.valid is not None:
            delta = delta.index_select(0, bucket.valid)
        columns = y[:, column : column + width]
        delta += columns.index_select(0, bucket.rows)
        columns.index_copy_(0, bucket.rows, delta.to(y.dtype))


def _gather_weights(
    pool_layer: torch.Tensor, spec: LoRASpec, group: LoRAGroup, bucket: _Bucket
) -> tuple[torch.Tensor, int]:
    """Returns the elements [n, E] of the pages that hold the group, and the place of the first of
    them in the virtual array."""
    layout = bucket.layout
    used = [
        (
            layout.a_start[module],
            layout.b_start[module] + layout.rank[module] * spec.row_stride(width),
        )
        for module, width in zip(group.modules, group.out_features, strict=True)
        if layout.rank[module]
    ]
    page_elems = pool_layer.shape[1]
    first = min(start for start, _ in used) // page_elems
    end = -(-max(stop for _, stop in used) // page_elems)
    if end <= bucket.num_consecutive:
        start = (bucket.first_page + first) * page_elems
        return pool_layer.view(1, -1)[:, start : start + (end - first) * page_elems], (
            first * page_elems
        )
    pages = bucket.pages[:, first:end].reshape(-1)
    weights = pool_layer.index_select(0, pages).view(bucket.pages.shape[0], -1)
    return weights, first * page_elems


def _matrix(
    spec: LoRASpec, weights: torch.Tensor, start: int, rank: int, features: int
) -> torch.Tensor:
    """Returns float32 [n, rank, features], a view if the weights are float32."""
    stride = spec.row_stride(features)
    rows = weights[:, start : start + rank * stride].unflatten(1, (rank, stride))
    return rows[:, :, :features].float()
