"""Packs the tensors of an adapter into the layout of pages, and hashes them as they are read.

Layers with the same layout are packed in blocks, see block.py. Threads take whole layers and share
only the file.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.adapters.content_hash import hash_adapter
from loraplex.engine.adapters.packing.block import Layer, PackJob, Sides, pack_block
from loraplex.engine.adapters.safetensors_file import SafetensorsFile
from loraplex.engine.adapters.target import AdapterTarget, ModuleKey
from loraplex.engine.adapters.vocabulary.content import VocabularyContent
from loraplex.engine.model.shard import ModuleShard
from loraplex.memory.adapter_layout import (
    SEGMENTS,
    VECTORS,
    ModuleParts,
    SegmentName,
    Segments,
    num_pages,
)
from loraplex.memory.host.store import Allocate, PackedAdapter
from loraplex.memory.vocabulary_part import VocabularyParts

NUM_TASKS = 8
"""Largest number of tasks that one adapter is split into."""

BLOCK_BYTES = 16 << 20
"""Bytes of the file in a block; a block holds at least one layer. Larger blocks miss the cache."""


class UnusableWeightsError(ValueError):
    """Weights are NaN or infinite, or out of range of the model's dtype."""


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """An adapter whose header was checked.

    Attributes:
        layers: the tensors of each adapted module, in the file.
        scales: the scale of each of these modules.
        replaces_bias: their biases come in place of the base model's. Otherwise they are added and
            multiplied by the scale.
        vocabulary: the changes of the embedding and the head; None: there are none.
    """

    layers: Mapping[ModuleKey, Sides]
    scales: Mapping[ModuleKey, float]
    replaces_bias: bool = False
    vocabulary: VocabularyContent | None = None


def pack(
    file: SafetensorsFile,
    content: AdapterContent,
    *,
    target: AdapterTarget,
    allocate: Allocate,
    packers: Executor | None = None,
    content_hash: str | None = None,
) -> PackedAdapter:
    """Read, hash and pack the tensors of an adapter.

    Args:
        allocate: returns the memory to pack into.
        packers: threads that share the work; None: the calling thread does it.
        content_hash: the hash, if these very files were packed before. They are then not hashed
            and not searched for NaN again.

    Raises:
        UnusableRowsError: a number of the vocabulary is NaN or infinite.
        UnusableWeightsError: a weight is NaN, infinite, or out of range of the target's dtype.
        DamagedFileError: the file was truncated during the read.
    """
    layers, distinct = [], dict[tuple[tuple[int, ModuleParts], ...], tuple[Segments, int]]()
    shape = (target.num_layers, len(target.modules))
    rank, scale = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    starts: dict[SegmentName, npt.NDArray[np.int32]]
    starts = {name: np.zeros(shape, dtype=np.int32) for name in SEGMENTS}
    of_layers: list[dict[int, Sides]] = [{} for _ in range(target.num_layers)]
    for (layer, module), sides in content.layers.items():
        of_layers[layer][module] = dict(sorted(sides.items()))  # A, B, gain, shift
        rank[layer, module], scale[layer, module] = (
            sides["A"].shape[0],
            content.scales[layer, module],
        )
    for layer, of_layer in enumerate(of_layers):
        parts = {m: _parts_of(of_layer[m], target.modules[m]) for m in sorted(of_layer)}
        key = tuple(parts.items())
        if key not in distinct:
            distinct[key] = target.place(parts)
        segments, num_used = distinct[key]
        for (module, name), segment in segments.items():
            starts[name][layer, module] = segment.first
        scale_of = {module: float(scale[layer, module]) for module in of_layer}
        num_bytes = sum(side.num_bytes for sides in of_layer.values() for side in sides.values())
        layers.append(Layer(layer, segments, num_used, of_layer, scale_of, num_bytes))
    vocabulary, parts_of_vocabulary = content.vocabulary, VocabularyParts()
    used = max(used for _, used in distinct.values())
    if vocabulary is not None:
        parts_of_vocabulary, used = vocabulary.place(used, target)
    count = num_pages(used, target.page_elems)
    num_elems = target.num_layers * count * target.page_elems
    data = allocate(num_elems * target.dtype.itemsize).view(target.dtype)
    data = data.view(target.num_layers, -1)
    job = PackJob(file, target.modules, content_hash is not None, content.replaces_bias, scale)
    leaves = _pack_layers(job, layers, data, packers)
    if vocabulary is not None:
        vocabulary.write(data, parts_of_vocabulary, target)
    if content_hash is None:
        more = [] if vocabulary is None else [vocabulary.leaf()]
        content_hash = hash_adapter(leaves + more)
    return PackedAdapter(
        content_hash=content_hash,
        num_pages=count,
        data=data,
        rank=torch.from_numpy(rank),
        a_start=torch.from_numpy(starts["A"]),
        b_start=torch.from_numpy(starts["B"]),
        gain_start=torch.from_numpy(starts["gain"]),
        shift_start=torch.from_numpy(starts["shift"]),
        scale=torch.from_numpy(scale),
        replaces_bias=content.replaces_bias,
        vocabulary=parts_of_vocabulary,
    )


def _parts_of(sides: Sides, module: ModuleShard) -> ModuleParts:
    """Returns the parts of a module in the pages.

    Where the base adds a bias, a gain needs a shift, because DoRA does not scale the bias.
    """
    has_shift = "shift" in sides or ("gain" in sides and module.spec.has_bias)
    there = {"gain": "gain" in sides, "shift": has_shift}
    vectors = tuple(name for name in VECTORS if there[name])
    return ModuleParts(sides["A"].shape[0], vectors)


def _pack_layers(
    job: PackJob, layers: list[Layer], data: torch.Tensor, packers: Executor | None
) -> list[bytes]:
    """Pack all layers. Returns the leaf of each adapted layer, in order; none if `is_known`.

    No thread writes to `data` after this returns or raises.
    """
    if packers is None:
        return _pack_some(job, layers, range(len(layers)), data)
    num_tasks = min(NUM_TASKS, len(layers))
    bounds = [len(layers) * task // num_tasks for task in range(num_tasks + 1)]
    tasks = [
        packers.submit(_pack_some, job, layers, range(start, end), data)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    wait(tasks)
    return [leaf for task in tasks for leaf in task.result()]


def _pack_some(
    job: PackJob, layers: list[Layer], numbers: range, data: torch.Tensor
) -> list[bytes]:
    leaves = []
    largest = max(layers[n].num_bytes for n in numbers)
    scratch = np.empty(max(BLOCK_BYTES, largest), dtype=np.uint8)
    for block in _blocks(layers, numbers):
        rows = data[block.start : block.stop]
        some = layers[block.start : block.stop]
        leaves += pack_block(job, some, rows, scratch)
        if not job.is_known:
            for number in block:
                _check_layer(number, data[number, : layers[number].num_used], job.scale[number])
    return leaves


def _blocks(layers: list[Layer], numbers: range) -> Iterator[range]:
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


def _check_layer(number: int, weights: torch.Tensor, scale: npt.NDArray[np.float32]) -> None:
    """Raise UnusableWeightsError unless every packed weight of the layer is finite, and the scales
    of its modules, which are NaN where weights in e4m3 were not."""
    is_finite = not len(weights) or torch.stack(torch.aminmax(weights)).isfinite().all()
    if not is_finite or not np.isfinite(scale).all():
        raise UnusableWeightsError(
            f"layer {number} holds NaN or infinite values, or some that {weights.dtype} cannot"
        )
