"""Packs the tensors of an adapter in page layout, by blocks of layers that are laid out alike.

A block is one read, A straight to its place where the file has it as the pool does, and for each
module one copy that transposes B. So there are few calls: between them a thread holds the
interpreter, which the others need. Threads take whole layers and share nothing but the file.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.adapters.safetensors_file import (
    MAX_HEADER_BYTES,
    ByteArray,
    SafetensorsFile,
    TensorPlace,
)
from loraplex.memory.adapter_layout import (
    MODULES,
    ModulePlace,
    ModuleShape,
    align,
    num_pages,
    place_layer,
)
from loraplex.memory.host.store import Allocate, PackedAdapter

NUM_TASKS = 8
"""Parts in which an adapter is packed, at most: enough for the threads there are."""

BLOCK_BYTES = 16 << 20
"""Of the file in a block, unless a layer has more. Larger blocks fall out of the cache."""

ModuleKey = tuple[int, int]  # layer, module id
BitArray = npt.NDArray[np.unsignedinteger]
Sides = dict[str, TensorPlace]  # "A" [rank, in_features], "B" [out_features, rank]

_ALIGN = 64  # of what lies in scratch memory
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

    def is_like(self, other: "_Layer") -> bool:
        """Whether the same elements come from tensors of the same types."""
        return self.places == other.places and all(
            self.sides[module][side].dtype is other.sides[module][side].dtype
            for module in self.sides
            for side in "AB"
        )

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return sum(place.num_bytes for sides in self.sides.values() for place in sides.values())


def pack(
    file: SafetensorsFile,
    found: Mapping[ModuleKey, Sides],
    scales: Mapping[ModuleKey, float],
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
        packers: threads that share the work; None: the caller's alone.
        content_hash: of this very content, if it was packed before; it is not hashed nor searched
            for NaN again.

    Raises:
        UnusableWeightsError: NaN, infinity, or beyond the range of the target's dtype.
        DamagedFileError: the file was truncated meanwhile.
    """
    shape = (target.num_layers, len(MODULES))
    rank, a_start, b_start = (np.zeros(shape, dtype=np.int32) for _ in range(3))
    scale = np.zeros(shape, dtype=np.float32)
    for key, sides in found.items():
        rank[key], scale[key] = sides["A"].shape[0], scales[key]
    layers, distinct = [], dict[tuple[int, ...], tuple[dict[int, ModulePlace], int]]()
    for layer, row in enumerate(map(tuple, rank.tolist())):
        if row not in distinct:
            distinct[row] = place_layer(_by_module(row), target.shapes)
        places, num_used = distinct[row]
        for module, place in places.items():
            a_start[layer, module], b_start[layer, module] = place.a_start, place.b_start
        layers.append(_Layer(places, num_used, {m: found[layer, m] for m in places}))
    count = num_pages([_by_module(row) for row in distinct], target.shapes, target.page_elems)
    num_elems = target.num_layers * count * target.page_elems
    data = allocate(num_elems * target.dtype.itemsize).view(target.dtype)
    data = data.view(target.num_layers, -1)
    leaves = _pack_layers(file, layers, data, packers, is_known=content_hash is not None)
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


def _by_module(ranks: Sequence[int]) -> dict[int, int]:
    return {module: rank for module, rank in enumerate(ranks) if rank}


def _pack_some(
    file: SafetensorsFile,
    layers: list[_Layer],
    numbers: range,
    data: torch.Tensor,
    is_known: bool,
) -> list[bytes]:
    leaves = []
    largest = max(layers[n].num_bytes for n in numbers)
    scratch = np.empty(max(BLOCK_BYTES, largest) + 2 * len(MODULES) * _ALIGN, dtype=np.uint8)
    for block in _blocks(layers, numbers):
        rows = data[block.start : block.stop]
        _pack_block(file, layers[block.start : block.stop], rows, scratch)
        if not is_known:
            leaves += [_check_layer(n, data[n, : layers[n].num_used]) for n in block]
    return leaves


def _blocks(layers: list[_Layer], numbers: range) -> Iterator[range]:
    """Runs of layers that are alike and have BLOCK_BYTES together, or single ones."""
    start = numbers.start
    num_bytes = 0
    for number in numbers:
        layer = layers[number]
        num_bytes += layer.num_bytes
        if number > start and (num_bytes > BLOCK_BYTES or not layer.is_like(layers[start])):
            yield range(start, number)
            start, num_bytes = number, layer.num_bytes
    yield range(start, numbers.stop)


def _pack_block(
    file: SafetensorsFile, layers: list[_Layer], rows: torch.Tensor, scratch: ByteArray
) -> None:
    """Layers that are alike, into their rows."""
    row_bytes = rows.view(torch.uint8).numpy()
    bits = row_bytes.view(_BITS[rows.dtype.itemsize])
    reads: list[tuple[TensorPlace, ByteArray]] = []
    copies: list[tuple[BitArray, ByteArray, TensorPlace, bool]] = []
    used = 0
    for module, place in layers[0].places.items():
        for side, start in (("A", place.a_start), ("B", place.b_start)):
            tensors = [layer.sides[module][side] for layer in layers]
            width = tensors[0].shape[1 if side == "A" else 0]
            num_bytes = tensors[0].num_bytes
            if side == "A" and tensors[0].dtype is rows.dtype and width == align(width):
                begin = start * rows.dtype.itemsize
                sources = row_bytes[:, begin : begin + num_bytes]
            else:
                sources = scratch[used : used + len(layers) * num_bytes].reshape(len(layers), -1)
                used += -(-sources.size // _ALIGN) * _ALIGN
                target = _rows_of(bits, start, place.rank, width)
                copies.append((target, sources, tensors[0], side == "B"))
            reads += zip(tensors, sources, strict=True)
    file.read(reads)
    for target, sources, tensor, is_transposed in copies:
        source = _as_bits(sources, tensor, rows.dtype)
        source = source.swapaxes(1, 2) if is_transposed else source
        np.copyto(target[:, :, : source.shape[2]], source)
        target[:, :, source.shape[2] :] = 0
    bits[:, layers[0].num_used :] = 0  # a page's next tenant must find finite numbers


def _rows_of(bits: BitArray, start: int, count: int, width: int) -> BitArray:
    """[layers, count, align(width)]: so many rows of each layer, padding included."""
    layer_stride, item = bits.strides
    return np.lib.stride_tricks.as_strided(
        bits[:, start:],
        (len(bits), count, align(width)),
        (layer_stride, align(width) * item, item),
    )


def _as_bits(sources: ByteArray, tensor: TensorPlace, dtype: torch.dtype) -> BitArray:
    """Tensors of one shape as `dtype`, by their bits: NumPy knows no bfloat16, and transposes three
    times as fast as torch."""
    shape = (len(sources), *tensor.shape)
    if tensor.dtype is not dtype:
        of_file = torch.from_numpy(sources.reshape(-1)).view(tensor.dtype)
        sources = of_file.to(dtype).view(torch.uint8).numpy()
    return sources.view(_BITS[dtype.itemsize]).reshape(shape)


def _check_layer(number: int, weights: torch.Tensor) -> bytes:
    """The hash of a layer that has been packed."""
    if len(weights) and not bool(torch.stack(torch.aminmax(weights)).isfinite().all()):
        raise UnusableWeightsError(
            f"layer {number} holds NaN or infinite values, or some that {weights.dtype} cannot"
        )
    return hashlib.sha256(weights.view(torch.uint8).numpy().data).digest()
