"""The sizes of the base model that adapters must fit, on one worker rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraplex.engine.adapters.safetensors_file import MAX_HEADER_BYTES
from loraplex.engine.model.shard import ModuleShard
from loraplex.memory.adapter_layout import (
    ModuleParts,
    ModuleShape,
    Segments,
    full_layer,
    num_pages,
    place_layer,
)

ModuleKey = tuple[int, int]  # layer, module id


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """Sizes of the base model on one worker rank, which adapters must fit."""

    num_layers: int
    modules: tuple[ModuleShard, ...]
    """This rank's parts of the modules of a layer: A is cut by input, B by output."""
    page_elems: int
    dtype: torch.dtype
    max_rank: int
    pin_memory: bool = False  # copies in host memory are page-locked
    adapter_root: str = ""  # real path; files of adapters in it are opened without leaving it

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        """The sizes of this rank's parts."""
        return tuple(module.shape for module in self.modules)

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
        return self.pages_of(self.max_rank)

    def pages_of(self, rank: int) -> int:
        """Returns the pages of an adapter with this rank on every module."""
        return num_pages(self.place(full_layer(self.shapes, rank))[1], self.page_elems)

    def place(self, parts: Mapping[int, ModuleParts]) -> tuple[Segments, int]:
        """Lay out one layer; see place_layer."""
        return place_layer(parts, self.shapes, elem_bytes=self.dtype.itemsize)

    @property
    def max_file_bytes(self) -> int:
        """Size of a file with every module at the largest rank in float64, and its header."""
        per_rank = sum(shape.in_features + shape.out_features for shape in self.full_shapes)
        return 8 * self.num_layers * self.max_rank * per_rank + MAX_HEADER_BYTES
