"""The sizes of the base model that adapters must fit, on one worker rank."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import cast

import torch

from loraplex.engine.adapters.safetensors_file import MAX_HEADER_BYTES
from loraplex.engine.model.modules import Axis, ModuleSpec
from loraplex.engine.model.shard import ModuleShard, Piece
from loraplex.memory.adapter_layout import (
    VECTORS,
    ModuleParts,
    ModuleShape,
    Segments,
    VectorName,
    full_layer,
    num_pages,
    place_layer,
)
from loraplex.memory.vocabulary_part import stretch_elems

ModuleKey = tuple[int, int]  # layer, module id


@dataclass(frozen=True, slots=True)
class VocabularyTarget:
    """The embedding and the head of the base model on one worker rank.

    Attributes:
        tokens: the tokens whose rows this rank holds.
        is_tied: both have the same weights.
        max_rows: largest number of rows of each that an adapter may replace.
        base: path of the checkpoint; empty: its weights are random.
    """

    tokens: Piece
    hidden_size: int
    is_tied: bool
    max_rows: int
    base: str = ""


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """Sizes of the base model on one worker rank, which adapters must fit."""

    num_layers: int
    modules: tuple[ModuleShard, ...]
    """This rank's parts of the modules of a layer: A is cut by input, B by output."""
    page_elems: int
    dtype: torch.dtype
    max_rank: int
    weight_dtype: torch.dtype | None = None  # of A and B in pages; None: `dtype`
    pin_memory: bool = False  # copies in host memory are page-locked
    adapter_roots: tuple[str, ...] = ()
    """Folders as root_of() takes them; the files of adapters in one are opened without leaving
    it."""
    vocabulary: VocabularyTarget | None = None  # None: adapters change the layers alone

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        """The sizes of this rank's parts."""
        return tuple(module.shape for module in self.modules)

    @property
    def packing(self) -> int:
        """Numbers of A and B in an element of a page."""
        return self.dtype.itemsize // (self.weight_dtype or self.dtype).itemsize

    @property
    def full_shapes(self) -> tuple[ModuleShape, ...]:
        """The sizes that an adapter's files must have."""
        return tuple(module.full_shape for module in self.modules)

    def full_name(self, key: ModuleKey) -> str:
        """Returns a module's name in Hugging Face's models."""
        layer, module = key
        return self.modules[module].spec.full_name(layer)

    @property
    def max_pages(self) -> int:
        """Pages of the largest adapter that may be loaded."""
        used = self.place(full_layer(self.shapes, self.max_rank, VECTORS))[1]
        return num_pages(used + self._vocabulary_elems, self.page_elems)

    @property
    def _vocabulary_elems(self) -> int:
        """Elements of a layer that the largest changes of embedding and head take."""
        sizes = self.vocabulary
        if sizes is None:
            return 0
        rows = (self.max_rank, self.max_rank, sizes.max_rows)
        widths = (sizes.tokens.size, sizes.hidden_size, sizes.hidden_size)
        stretches = (r * w for r, w in zip(rows, widths, strict=True))
        return 2 * sum(stretch_elems(num_elems, self.num_layers) for num_elems in stretches)

    def pages_of(self, rank: int, vectors: tuple[VectorName, ...] = ()) -> int:
        """Returns the pages of an adapter with this rank, and these vectors, on every module."""
        return num_pages(self.place(full_layer(self.shapes, rank, vectors))[1], self.page_elems)

    def place(self, parts: Mapping[int, ModuleParts]) -> tuple[Segments, int]:
        """Lay out one layer; see place_layer."""
        return place_layer(parts, self.shapes, self.packing)

    @property
    def max_file_bytes(self) -> int:
        """Size of a file with every module at the largest rank, every vector, embedding and head in
        float64, and its header."""
        per_rank = sum(shape.in_features + shape.out_features for shape in self.full_shapes)
        vectors = len(VECTORS) * sum(shape.out_features for shape in self.full_shapes)
        num_elems = self.num_layers * (self.max_rank * per_rank + vectors)
        if self.vocabulary is not None:
            num_tokens, width = self.vocabulary.tokens.total, self.vocabulary.hidden_size
            per_token = width + self.max_rank
            num_elems += 2 * (num_tokens + self.vocabulary.max_rows) * per_token
            num_elems += 2 * self.max_rank * width
        return 8 * num_elems + MAX_HEADER_BYTES


def names_of(modules: tuple[ModuleShard, ...]) -> list[str]:
    """Returns ReaderStart.module_names."""
    specs = [module.spec for module in modules]
    return [name for s in specs for name in (s.name, s.parent, s.inputs, s.outputs)]


def numbers_of(modules: tuple[ModuleShard, ...]) -> list[int]:
    """Returns ReaderStart.module_numbers."""
    numbers: list[int] = []
    for module in modules:
        pieces = (*astuple(module.inputs), *astuple(module.outputs))
        numbers += (module.spec.group, int(module.spec.has_bias), *pieces)
    return numbers


def modules_of(names: Sequence[str], numbers: Sequence[int]) -> tuple[ModuleShard, ...]:
    """Returns the modules from names_of and numbers_of."""
    modules = []
    for index in range(len(names) // 4):
        name, parent, inputs, outputs = names[4 * index : 4 * index + 4]
        group, has_bias, *pieces = numbers[10 * index : 10 * index + 10]
        axes = cast(Axis, inputs), cast(Axis, outputs)
        spec = ModuleSpec(name, parent, *axes, group, bool(has_bias))
        modules.append(ModuleShard(spec, Piece(*pieces[:4]), Piece(*pieces[4:])))
    return tuple(modules)


def vocabulary_numbers(sizes: VocabularyTarget | None) -> list[int]:
    """Returns ReaderStart.vocabulary_numbers."""
    if sizes is None:
        return []
    return [*astuple(sizes.tokens), sizes.hidden_size, int(sizes.is_tied), sizes.max_rows]


def vocabulary_of(numbers: Sequence[int], base: str) -> VocabularyTarget | None:
    """Returns the sizes from vocabulary_numbers."""
    if not numbers:
        return None
    *piece, hidden_size, is_tied, max_rows = numbers
    return VocabularyTarget(Piece(*piece), hidden_size, bool(is_tied), max_rows, base)
