"""Packs a block of layers that have the same layout.

A block takes one read and, for each module, one copy that transposes B. A of a known adapter needs
no copy when its dtype and its row length equal the pool's: it is read straight into its place.
Where A and B are in fewer bits than the pool's dtype, they are rounded together, see rounding.py.
Large calls matter, because a thread holds the interpreter between calls and other threads need it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.adapters.content_hash import HashedModule, hash_layer
from loraplex.engine.adapters.packing.rounding import round_pair
from loraplex.engine.adapters.safetensors_file import ByteArray, SafetensorsFile, TensorPlace
from loraplex.engine.model.shard import ModuleShard
from loraplex.memory.adapter_layout import VECTORS, Segment, SegmentName, Segments, align
from loraplex.memory.vector_rows import split_vector

BitArray = npt.NDArray[np.unsignedinteger]
SideName = SegmentName | Literal["A_scale", "B_scale"]
Sides = dict[SideName, TensorPlace]
"""The tensors of a module: "A" [rank, in_features], "B" [out_features, rank], vectors, and scales
of A and B, one number or one for each row, by which they are multiplied."""

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class Layer:
    """The modules of one layer: their tensors in the file and their segments in the pages."""

    number: int
    segments: Segments
    num_used: int  # elements; the rest of the row is zeroed
    sides: dict[int, Sides]  # by module id; a segment without a tensor is zeros
    scales: dict[int, float]  # by module id
    num_bytes: int  # of the layer's tensors in the file

    def is_like(self, other: "Layer") -> bool:
        """Returns True if both layers may be in one block: equal segments, equal file dtypes."""
        return self.segments == other.segments and all(
            sides.keys() == other.sides[module].keys()
            and all(
                place.dtype is other.sides[module][name].dtype
                and place.num_bytes == other.sides[module][name].num_bytes
                for name, place in sides.items()
            )
            for module, sides in self.sides.items()
        )


@dataclass(frozen=True, slots=True)
class PackJob:
    """The arguments of `pack` that every layer needs."""

    file: SafetensorsFile
    modules: tuple[ModuleShard, ...]
    is_known: bool  # neither hash nor search for NaN
    replaces_bias: bool
    scale: npt.NDArray[np.float32]
    """[layers, modules]; the scale of A and B that are rounded to fewer bits is multiplied in."""


def pack_block(
    job: PackJob, layers: list[Layer], rows: torch.Tensor, scratch: ByteArray
) -> list[bytes]:
    """Read and pack layers that are alike into their rows. Returns their leaves."""
    first = layers[0]
    row_bytes = rows.view(torch.uint8).numpy()
    bits = row_bytes.view(_BITS[rows.dtype.itemsize])
    reads: list[tuple[TensorPlace, ByteArray]] = []
    copies: list[tuple[tuple[int, SegmentName], Segment, ByteArray]] = []
    rounded: dict[tuple[int, SegmentName], BitArray] = {}
    parts = _lay_out(job, first, scratch[: len(layers) * first.num_bytes], len(layers))
    for (module, name), segment in first.segments.items():
        if (module, name) not in parts:
            _rows_of(bits, segment)[:] = 0
            continue
        tensors = [layer.sides[module][name] for layer in layers]
        piece = job.modules[module].inputs
        is_direct = name == "A" and tensors[0].dtype is rows.dtype and piece.is_whole
        is_direct = is_direct and (module, "A_scale") not in parts and segment.packing == 1
        if job.is_known and is_direct and piece.size == align(piece.size):
            begin = segment.start * rows.dtype.itemsize
            source = row_bytes[:, begin : begin + tensors[0].num_bytes]
        else:
            source = parts[module, name]
            copies.append(((module, name), segment, source))
        reads += zip(tensors, source, strict=True)
    reads += [
        (layer.sides[module][name], data)
        for (module, name), part in parts.items()
        if name in ("A_scale", "B_scale")
        for layer, data in zip(layers, part, strict=True)
    ]
    job.file.read(reads)
    leaves = [] if job.is_known else _hash_block(job, layers, scratch)
    for (module, name), segment, source in copies:
        target, tensor = _rows_of(bits, segment), first.sides[module][name]
        if segment.packing > 1:
            if name == "A":
                rounded |= _round_module(job, layers, parts, module)
            matrix = rounded.pop((module, name))
        elif name in VECTORS:
            scales = [layer.scales[module] for layer in layers]
            matrix = _as_rows(job, name, _as_floats(source, tensor), scales, rows.dtype)
            matrix = matrix if job.modules[module].adds_bias or name == "gain" else matrix * 0
        else:
            factors = _factors(first.sides[module], parts, module, name)
            matrix = _as_bits(source, tensor, rows.dtype, factors)
        matrix = matrix.swapaxes(1, 2) if name == "B" else matrix
        piece = job.modules[module].inputs if name == "A" else job.modules[module].outputs
        matrix = matrix[:, :, piece.start : piece.stop]
        np.copyto(target[:, :, : matrix.shape[2]], matrix)
        target[:, :, matrix.shape[2] :] = 0
    bits[:, first.num_used :] = 0  # the next user of a page must find finite numbers
    return leaves


def _by_name(job: PackJob, ids: Iterable[int]) -> list[int]:
    """Returns module ids in the order in which their bytes are hashed."""
    return sorted(ids, key=lambda module: job.modules[module].spec.name)


def _lay_out(
    job: PackJob, layer: Layer, scratch: ByteArray, num_layers: int
) -> dict[tuple[int, SideName], ByteArray]:
    """Returns the part of each tensor, uint8 [layers, bytes], of layers that are like `layer`.

    The bytes of a layer lie one after another, as they are hashed.
    """
    whole, start = scratch.reshape(num_layers, layer.num_bytes), 0
    parts: dict[tuple[int, SideName], ByteArray] = {}
    for module in _by_name(job, layer.sides):
        for name, place in layer.sides[module].items():
            parts[module, name] = whole[:, start : start + place.num_bytes]
            start += place.num_bytes
    return parts


def _hash_block(job: PackJob, layers: list[Layer], scratch: ByteArray) -> list[bytes]:
    """Returns the leaf of each layer that has adapted modules, from the bytes of the file."""
    labels = {
        "A": "",
        "A_scale": "scale",
        "B": "",
        "B_scale": "scale",
        "gain": "magnitude",
        "shift": "bias" if job.replaces_bias else "lora_bias",
    }
    leaves = []
    for index, layer in enumerate(layers):
        hashed = [
            HashedModule(
                name=job.modules[module].spec.name,
                scale=layer.scales[module],
                tensors=tuple((labels[name], p) for name, p in layer.sides[module].items()),
            )
            for module in _by_name(job, layer.sides)
        ]
        if hashed:
            start = index * layer.num_bytes
            leaves.append(
                hash_layer(layer.number, hashed, scratch[start : start + layer.num_bytes])
            )
    return leaves


def _rows_of(bits: BitArray, segment: Segment) -> BitArray:
    """Returns a view [layers, rows, numbers] of a segment of each layer, with padding."""
    layer_stride, item = bits.strides
    stride = align(segment.row_elems)
    rows = np.lib.stride_tricks.as_strided(
        bits[:, segment.start :],
        (len(bits), segment.num_rows, stride),
        (layer_stride, stride * item, item),
    )
    return rows.view(_BITS[item // segment.packing])


def _factors(
    sides: Sides,
    parts: dict[tuple[int, SideName], ByteArray],
    module: int,
    name: SegmentName,
) -> torch.Tensor | None:
    """Returns the scales of A or of B, float32 [layers, rows or 1, 1], if there are any."""
    scale_name: SideName = "A_scale" if name == "A" else "B_scale"
    if scale_name not in sides:
        return None
    return _as_floats(parts[module, scale_name], sides[scale_name])[..., None]


def _round_module(
    job: PackJob, layers: list[Layer], parts: dict[tuple[int, SideName], ByteArray], module: int
) -> dict[tuple[int, SegmentName], BitArray]:
    """Returns A and B of a module in e4m3, viewed as integers, and multiplies their scale into
    `job.scale`."""
    sides = layers[0].sides[module]

    def floats(name: SegmentName) -> torch.Tensor:
        values = _as_floats(parts[module, name], sides[name]).view(-1, *sides[name].shape)
        factors = _factors(sides, parts, module, name)
        return values if factors is None else values * factors

    a, b, scale = round_pair(floats("A"), floats("B"))
    job.scale[[layer.number for layer in layers], module] *= scale.numpy()
    return {(module, "A"): a.view(torch.uint8).numpy(), (module, "B"): b.view(torch.uint8).numpy()}


def _as_bits(
    sources: ByteArray, tensor: TensorPlace, dtype: torch.dtype, factors: torch.Tensor | None
) -> BitArray:
    """Returns tensors of one shape as `dtype`, viewed as unsigned integers: NumPy has no bfloat16,
    and it transposes three times as fast as torch. They are multiplied by `factors`, if given."""
    shape = (len(sources), *tensor.shape)
    if tensor.dtype is not dtype or factors is not None:
        of_file = torch.from_numpy(sources.reshape(-1)).view(tensor.dtype)
        if factors is not None:
            of_file = (of_file.view(shape).float() * factors).flatten()
        sources = of_file.to(dtype).view(torch.uint8).numpy()
    return sources.view(_BITS[dtype.itemsize]).reshape(shape)


def _as_rows(
    job: PackJob, name: SegmentName, values: torch.Tensor, scales: list[float], dtype: torch.dtype
) -> BitArray:
    """Returns vectors as the rows of their segments, [layers, VECTOR_ROWS, features] in `dtype`.

    Args:
        values: float32 [layers, features].
    """
    if name == "shift" and not job.replaces_bias:
        values = values * torch.tensor(scales)[:, None]
    return split_vector(values, dtype).view(torch.uint8).numpy().view(_BITS[dtype.itemsize])


def _as_floats(sources: ByteArray, tensor: TensorPlace) -> torch.Tensor:
    """Returns vectors, float32 [layers, features]."""
    values = torch.from_numpy(sources.reshape(-1)).view(tensor.dtype)
    return values.view(len(sources), -1).float()
