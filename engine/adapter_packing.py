"""Packs the tensors of an adapter in page layout, layer by layer, by several threads.

A layer's tensors are read into a scratch buffer that stays in the cache, and written from there to
their place: A as it is, B transposed. Threads take whole layers and share nothing but the file.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.safetensors_file import (
    MAX_HEADER_BYTES,
    ByteArray,
    SafetensorsFile,
    TensorPlace,
    scratch_bytes,
)
from loraplex.memory.adapter_layout import (
    MODULES,
    ModulePlace,
    ModuleShape,
    align,
    num_pages,
    place_layer,
)
from loraplex.memory.host_store import Allocate, PackedAdapter

NUM_TASKS = 16
"""Parts in which an adapter is packed, at most: enough for the threads of one worker."""

ModuleKey = tuple[int, int]  # layer, module id
BitArray = npt.NDArray[np.unsignedinteger]
Sides = dict[str, TensorPlace]  # "A" [rank, in_features], "B" [out_features, rank]

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class UnusableWeightsError(ValueError):
    """Numbers that are none, or that the model's type cannot hold."""


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """The base model on one worker, as adapters must fit it."""

    num_layers: int
    shapes: tuple[ModuleShape, ...]
    page_elems: int
    dtype: torch.dtype
    max_rank: int
    pin_memory: bool = False  # the host's copies are to be page-locked

    @property
    def max_file_bytes(self) -> int:
        """A file of every module at the largest rank in float64, and its header."""
        per_rank = sum(shape.in_features + shape.out_features for shape in self.shapes)
        return 8 * self.num_layers * self.max_rank * per_rank + MAX_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class _Layer:
    """What to write in one layer."""

    places: dict[int, ModulePlace]  # by module id
    num_used: int  # elements; the rest is zeroed
    sides: dict[int, Sides]  # by module id


def pack(
    file: SafetensorsFile,
    found: dict[ModuleKey, Sides],
    scales: dict[ModuleKey, float],
    *,
    target: AdapterTarget,
    allocate: Allocate,
    packers: Executor | None = None,
    content_hash: str | None = None,
) -> PackedAdapter:
    """Read and pack checked tensors.

    Args:
        scales: of every module in `found`.
        allocate: gives the memory to pack into.
        packers: threads that share the work on a new content; None: the caller's alone.
        content_hash: of this very content, if it was packed before; it is not hashed nor searched
            for NaN again. What is left are many short copies, for which threads would take the
            interpreter from each other, and from the loop that launches steps.

    Raises:
        UnusableWeightsError: NaN, infinity, or beyond the range of the target's dtype.
        DamagedFileError: the file was truncated meanwhile.
    """
    shape = (target.num_layers, len(MODULES))
    rank, a_start, b_start = (np.zeros(shape, dtype=np.int32) for _ in range(3))
    scale = np.zeros(shape, dtype=np.float32)
    for key, sides in found.items():
        rank[key], scale[key] = sides["A"].shape[0], scales[key]
    layer_ranks = [{m: r for m, r in enumerate(row) if r} for row in rank.tolist()]
    layers = []
    for layer, ranks in enumerate(layer_ranks):
        places, num_used = place_layer(ranks, target.shapes)
        for module, place in places.items():
            a_start[layer, module], b_start[layer, module] = place.a_start, place.b_start
        layers.append(_Layer(places, num_used, {m: found[layer, m] for m in ranks}))
    count = num_pages(layer_ranks, target.shapes, target.page_elems)
    num_elems = target.num_layers * count * target.page_elems
    data = allocate(num_elems * target.dtype.itemsize).view(target.dtype)
    data = data.view(target.num_layers, -1)
    is_known = content_hash is not None
    leaves = _pack_layers(file, layers, data, None if is_known else packers, is_known=is_known)
    if content_hash is None:
        root = hashlib.sha256(f"{target.dtype} {shape}".encode())
        root.update(rank.tobytes() + scale.tobytes() + b"".join(leaves))
        content_hash = root.hexdigest()
    tables = (torch.from_numpy(array) for array in (rank, a_start, b_start, scale))
    return PackedAdapter(content_hash, count, data, *tables)


def _pack_layers(
    file: SafetensorsFile,
    layers: list[_Layer],
    data: torch.Tensor,
    packers: Executor | None,
    *,
    is_known: bool,
) -> list[bytes]:
    """Returns the hash of each layer; empty ones where the content is known.

    Every thread has left `data` alone when this returns or raises.
    """
    if packers is None:
        return _pack_some(file, layers, range(len(layers)), data, is_known)
    num_tasks = min(NUM_TASKS, len(layers))
    bounds = [len(layers) * task // num_tasks for task in range(num_tasks + 1)]
    tasks = [
        packers.submit(_pack_some, file, layers, range(start, end), data, is_known)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    wait(tasks)
    return [leaf for task in tasks for leaf in task.result()]


def _pack_some(
    file: SafetensorsFile,
    layers: list[_Layer],
    numbers: Sequence[int],
    data: torch.Tensor,
    is_known: bool,
) -> list[bytes]:
    needed = [scratch_bytes(_tensors(layers[n])) for n in numbers if layers[n].sides]
    scratch = np.empty(max(needed, default=0), dtype=np.uint8)
    leaves = []
    for number in numbers:
        layer, row = layers[number], data[number]
        if layer.sides:
            _pack_layer(file, layer, row, scratch)
        row[layer.num_used :].zero_()  # a page's next tenant must find finite numbers
        weights = row[: layer.num_used]
        if is_known:
            continue
        if layer.num_used and not bool(torch.stack(torch.aminmax(weights)).isfinite().all()):
            raise UnusableWeightsError(
                f"layer {number} holds NaN or infinite values, or some that {row.dtype} cannot"
            )
        leaves.append(hashlib.sha256(weights.view(torch.uint8).numpy().data).digest())
    return leaves


def _tensors(layer: _Layer) -> list[TensorPlace]:
    return [sides[side] for sides in layer.sides.values() for side in "AB"]


def _pack_layer(
    file: SafetensorsFile, layer: _Layer, row: torch.Tensor, scratch: ByteArray
) -> None:
    places = _tensors(layer)
    arrays = [
        _as_bits(data, place, row.dtype)
        for data, place in zip(file.read(places, scratch), places, strict=True)
    ]
    target = row.view(torch.uint8).numpy().view(_BITS[row.dtype.itemsize])
    for index, module in enumerate(layer.sides):
        place = layer.places[module]
        _write_rows(target, place.a_start, arrays[2 * index])
        _write_rows(target, place.b_start, arrays[2 * index + 1].T)


def _as_bits(data: ByteArray, place: TensorPlace, dtype: torch.dtype) -> BitArray:
    """A tensor's elements as `dtype`, by their bits: NumPy knows no bfloat16, and transposes three
    times as fast as torch."""
    if place.dtype is not dtype:
        data = torch.from_numpy(data).view(place.dtype).to(dtype).view(torch.uint8).numpy()
    return data.view(_BITS[dtype.itemsize]).reshape(place.shape)


def _write_rows(layer: BitArray, start: int, rows: BitArray) -> None:
    count, width = rows.shape
    stride = align(width)
    target = layer[start : start + count * stride].reshape(count, stride)
    np.copyto(target[:, :width], rows)
    if stride > width:
        target[:, width:] = 0
