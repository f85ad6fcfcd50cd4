"""Packs the tensors of an adapter into the layout of pages, and hashes them as they are read.

Layers with the same layout are packed in blocks. A block takes one read and, for each module, one
copy that transposes B. A of a known adapter needs no copy when its dtype and its row length equal
the pool's: it is read straight into its place. Large calls matter, because a thread holds the
interpreter between calls and other threads need it. Threads take whole layers and share only the
file.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.adapters.content_hash import HashedModule, hash_adapter, hash_layer
from loraplex.engine.adapters.safetensors_file import ByteArray, SafetensorsFile, TensorPlace
from loraplex.engine.adapters.target import AdapterTarget, ModuleKey
from loraplex.engine.model.shard import ModuleShard, Piece
from loraplex.memory.adapter_layout import (
    ModuleParts,
    Segment,
    SegmentName,
    Segments,
    align,
    num_pages,
)
from loraplex.memory.host.store import Allocate, PackedAdapter

NUM_TASKS = 8
"""Largest number of tasks that one adapter is split into."""

BLOCK_BYTES = 16 << 20
"""Bytes of the file in a block; a block holds at least one layer. Larger blocks miss the cache."""

BitArray = npt.NDArray[np.unsignedinteger]
Modules = tuple[ModuleShard, ...]
Sides = dict[SegmentName, TensorPlace]  # "A" [rank, in_features], "B" [out_features, rank]

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class UnusableWeightsError(ValueError):
    """Weights are NaN or infinite, or out of range of the model's dtype."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """The modules of one layer: their tensors in the file and their segments in the pages."""

    number: int
    segments: Segments
    num_used: int  # elements; the rest of the row is zeroed
    sides: dict[int, Sides]  # by module id
    scales: dict[int, float]  # by module id
    num_bytes: int  # of the layer's tensors in the file

    def is_like(self, other: "_Layer") -> bool:
        """Returns True if both layers may be in one block: equal segments, equal file dtypes."""
        return self.segments == other.segments and all(
            self.sides[module][name].dtype is other.sides[module][name].dtype
            for module, name in self.segments
        )


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
    """Read, hash and pack the tensors of an adapter whose header was checked.

    Args:
        found: the tensors of each adapted module.
        scales: the scale of each module in `found`.
        allocate: returns the memory to pack into.
        packers: threads that share the work; None: the calling thread does it.
        content_hash: the hash, if these very files were packed before. They are then not hashed
            and not searched for NaN again.

    Raises:
        UnusableWeightsError: a weight is NaN, infinite, or out of range of the target's dtype.
        DamagedFileError: the file was truncated during the read.
    """
    shape = (target.num_layers, len(target.modules))
    rank, a_start, b_start = (np.zeros(shape, dtype=np.int32) for _ in range(3))
    scale = np.zeros(shape, dtype=np.float32)
    for key, sides in found.items():
        rank[key], scale[key] = sides["A"].shape[0], scales[key]
    starts: dict[SegmentName, npt.NDArray[np.int32]] = {"A": a_start, "B": b_start}
    layers, distinct = [], dict[tuple[int, ...], tuple[Segments, int]]()
    for layer, row in enumerate(map(tuple, rank.tolist())):
        if row not in distinct:
            distinct[row] = target.place(_by_module(row))
        segments, num_used = distinct[row]
        for (module, name), segment in segments.items():
            starts[name][layer, module] = segment.start
        of_layer = {
            module: dict(sorted(found[layer, module].items())) for module in _by_module(row)
        }
        scale_of = {module: float(scale[layer, module]) for module in of_layer}
        num_bytes = sum(side.num_bytes for sides in of_layer.values() for side in sides.values())
        layers.append(_Layer(layer, segments, num_used, of_layer, scale_of, num_bytes))
    count = num_pages(max(used for _, used in distinct.values()), target.page_elems)
    num_elems = target.num_layers * count * target.page_elems
    data = allocate(num_elems * target.dtype.itemsize).view(target.dtype)
    data = data.view(target.num_layers, -1)
    leaves = _pack_layers(
        file, layers, data, packers, modules=target.modules, is_known=content_hash is not None
    )
    if content_hash is None:
        content_hash = hash_adapter(leaves)
    tables = (torch.from_numpy(array) for array in (rank, a_start, b_start, scale))
    return PackedAdapter(content_hash, count, data, *tables)


def _pack_layers(
    file: SafetensorsFile,
    layers: list[_Layer],
    data: torch.Tensor,
    packers: Executor | None,
    *,
    modules: Modules,
    is_known: bool,
) -> list[bytes]:
    """Pack all layers. Returns the leaf of each adapted layer, in order; none if `is_known`.

    No thread writes to `data` after this returns or raises.
    """
    if packers is None:
        return _pack_some(file, layers, range(len(layers)), data, modules, is_known)
    num_tasks = min(NUM_TASKS, len(layers))
    bounds = [len(layers) * task // num_tasks for task in range(num_tasks + 1)]
    tasks = [
        packers.submit(_pack_some, file, layers, range(start, end), data, modules, is_known)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    wait(tasks)
    return [leaf for task in tasks for leaf in task.result()]


def _by_module(ranks: Sequence[int]) -> dict[int, ModuleParts]:
    return {module: ModuleParts(rank) for module, rank in enumerate(ranks) if rank}


def _pack_some(
    file: SafetensorsFile,
    layers: list[_Layer],
    numbers: range,
    data: torch.Tensor,
    modules: Modules,
    is_known: bool,
) -> list[bytes]:
    leaves = []
    largest = max(layers[n].num_bytes for n in numbers)
    scratch = np.empty(max(BLOCK_BYTES, largest), dtype=np.uint8)
    for block in _blocks(layers, numbers):
        rows = data[block.start : block.stop]
        some = layers[block.start : block.stop]
        leaves += _pack_block(file, some, rows, scratch, modules, is_known)
        if not is_known:
            for number in block:
                _check_layer(number, data[number, : layers[number].num_used])
    return leaves


def _blocks(layers: list[_Layer], numbers: range) -> Iterator[range]:
    """Yield runs of layers that are alike and have at most BLOCK_BYTES, or single layers."""
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
    file: SafetensorsFile,
    layers: list[_Layer],
    rows: torch.Tensor,
    scratch: ByteArray,
    modules: Modules,
    is_known: bool,
) -> list[bytes]:
    """Read and pack layers that are alike into their rows. Returns their leaves."""
    row_bytes = rows.view(torch.uint8).numpy()
    bits = row_bytes.view(_BITS[rows.dtype.itemsize])
    reads: list[tuple[TensorPlace, ByteArray]] = []
    copies: list[tuple[BitArray, ByteArray, TensorPlace, bool, Piece]] = []
    parts = _lay_out(layers[0], scratch[: len(layers) * layers[0].num_bytes], len(layers), modules)
    for (module, name), segment in layers[0].segments.items():
        tensors = [layer.sides[module][name] for layer in layers]
        piece = modules[module].inputs if name == "A" else modules[module].outputs
        is_direct = name == "A" and tensors[0].dtype is rows.dtype and piece.is_whole
        if is_known and is_direct and piece.size == align(piece.size):
            begin = segment.start * rows.dtype.itemsize
            source = row_bytes[:, begin : begin + tensors[0].num_bytes]
        else:
            source = parts[module, name]
            copies.append((_rows_of(bits, segment), source, tensors[0], name == "B", piece))
        reads += zip(tensors, source, strict=True)
    file.read(reads)
    leaves = [] if is_known else _hash_block(layers, scratch, modules)
    for target, source, tensor, is_transposed, piece in copies:
        matrix = _as_bits(source, tensor, rows.dtype)
        matrix = matrix.swapaxes(1, 2) if is_transposed else matrix
        matrix = matrix[:, :, piece.start : piece.stop]
        np.copyto(target[:, :, : matrix.shape[2]], matrix)
        target[:, :, matrix.shape[2] :] = 0
    bits[:, layers[0].num_used :] = 0  # the next user of a page must find finite numbers
    return leaves


def _by_name(ids: Iterable[int], modules: Modules) -> list[int]:
    """Returns module ids in the order in which their bytes are hashed."""
    return sorted(ids, key=lambda module: modules[module].spec.name)


def _lay_out(
    layer: _Layer, scratch: ByteArray, num_layers: int, modules: Modules
) -> dict[tuple[int, SegmentName], ByteArray]:
    """Returns the part of each tensor, uint8 [layers, bytes], of layers that are like `layer`.

    The bytes of a layer lie one after another, as they are hashed.
    """
    whole, start = scratch.reshape(num_layers, layer.num_bytes), 0
    parts: dict[tuple[int, SegmentName], ByteArray] = {}
    for module in _by_name(layer.sides, modules):
        for name, place in layer.sides[module].items():
            parts[module, name] = whole[:, start : start + place.num_bytes]
            start += place.num_bytes
    return parts


def _hash_block(layers: list[_Layer], scratch: ByteArray, modules: Modules) -> list[bytes]:
    """Returns the leaf of each layer that has adapted modules, from the bytes of the file."""
    leaves = []
    for index, layer in enumerate(layers):
        hashed = [
            HashedModule(
                modules[module].spec.name, layer.scales[module], a=sides["A"], b=sides["B"]
            )
            for module, sides in ((m, layer.sides[m]) for m in _by_name(layer.sides, modules))
        ]
        if hashed:
            start = index * layer.num_bytes
            leaves.append(
                hash_layer(layer.number, hashed, scratch[start : start + layer.num_bytes])
            )
    return leaves


def _rows_of(bits: BitArray, segment: Segment) -> BitArray:
    """Returns a view [layers, rows, align(row_elems)] of a segment of each layer, with padding."""
    layer_stride, item = bits.strides
    stride = align(segment.row_elems)
    return np.lib.stride_tricks.as_strided(
        bits[:, segment.start :],
        (len(bits), segment.num_rows, stride),
        (layer_stride, stride * item, item),
    )


def _as_bits(sources: ByteArray, tensor: TensorPlace, dtype: torch.dtype) -> BitArray:
    """Returns tensors of one shape as `dtype`, viewed as unsigned integers: NumPy has no bfloat16,
    and it transposes three times as fast as torch."""
    shape = (len(sources), *tensor.shape)
    if tensor.dtype is not dtype:
        of_file = torch.from_numpy(sources.reshape(-1)).view(tensor.dtype)
        sources = of_file.to(dtype).view(torch.uint8).numpy()
    return sources.view(_BITS[dtype.itemsize]).reshape(shape)


def _check_layer(number: int, weights: torch.Tensor) -> None:
    """Raise UnusableWeightsError unless every packed weight of the layer is finite."""
    if len(weights) and not bool(torch.stack(torch.aminmax(weights)).isfinite().all()):
        raise UnusableWeightsError(
            f"layer {number} holds NaN or infinite values, or some that {weights.dtype} cannot"
        )
