"""The layout of an adapter's weights in its pages. Plain integers, no torch.

In every layer an adapter is one virtual array of elements, which is a list of named segments. For
each of its modules come r rows of A, each `in_features` long, then r rows of B transposed, each
`out_features` long. Behind all modules come their vectors, one number for each output feature. A
vector is the sum of two rows in the pool's dtype: so it is precise to 16 bits or more, and every
element of a page stays finite for the KV cache that uses the page next.

A and B may be in fewer bits than the pool's dtype. Several of their numbers then share an element
of the array. Their rows start at elements of the array like all others.

The array is cut into the adapter's pages in order, so element e lies in page
`page_ids[e // page_elems]` at `e % page_elems`. Ranks may differ from layer to layer; the pages
must hold the largest layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ROW_ALIGN = 64
"""Rows start at multiples of this many elements, so no aligned vector load crosses a page. The LoRA
kernels get it with each LoRAGroup."""

VectorName = Literal["gain", "shift"]
SegmentName = Literal["A", "B"] | VectorName

VECTORS: tuple[VectorName, ...] = ("gain", "shift")
"""The module's output y becomes gain * y + shift. In host memory gain holds the magnitude of DoRA
and shift the trained bias. The rest is computed in the pages, by
engine/worker/adapters/adapter_vectors.py."""
VECTOR_ROWS = 2
SEGMENTS: tuple[SegmentName, ...] = ("A", "B", *VECTORS)


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Sizes of one projection on one worker, which is a shard under tensor parallelism."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ModuleParts:
    """The parts of one module that an adapter changes in one layer."""

    rank: int
    vectors: tuple[VectorName, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows in a layer's virtual array: row i starts at element `start + i * align(row_elems)`."""

    start: int
    num_rows: int
    row_elems: int
    packing: int = 1  # numbers in an element

    @property
    def first(self) -> int:
        """The place of the first number, if the array is read in the numbers' own type."""
        return self.start * self.packing


Segments = dict[tuple[int, SegmentName], Segment]
"""By module id and name; a layer's in the order of their starts."""


def align(num_elems: int) -> int:
    """Round up to a whole number of aligned rows."""
    return -(-num_elems // ROW_ALIGN) * ROW_ALIGN


def place_layer(
    parts: Mapping[int, ModuleParts], shapes: tuple[ModuleShape, ...], packing: int = 1
) -> tuple[Segments, int]:
    """Lay out one layer, whose parts are given by module id. Returns its segments and the elements
    used.

    Args:
        packing: numbers of A and B in an element.
    """
    segments: Segments = {}
    used = 0

    def add(module: int, name: SegmentName, num_rows: int, width: int, packing: int) -> None:
        nonlocal used
        row_elems = -(-width // packing)
        segments[module, name] = Segment(used, num_rows, row_elems, packing)
        used += num_rows * align(row_elems)

    for module in sorted(parts):
        add(module, "A", parts[module].rank, shapes[module].in_features, packing)
        add(module, "B", parts[module].rank, shapes[module].out_features, packing)
    for module in sorted(parts):
        for name in parts[module].vectors:
            add(module, name, VECTOR_ROWS, shapes[module].out_features, 1)
    return segments, used


def full_layer(
    shapes: tuple[ModuleShape, ...], rank: int, vectors: tuple[VectorName, ...] = ()
) -> dict[int, ModuleParts]:
    """Returns the parts of an adapter with this rank on every module."""
    return dict.fromkeys(range(len(shapes)), ModuleParts(rank, vectors))


def num_pages(num_elems: int, page_elems: int) -> int:
    """Return the pages that an adapter needs whose largest layer uses `num_elems`, at least one."""
    if page_elems % ROW_ALIGN:
        raise ValueError(f"page_elems must be a multiple of {ROW_ALIGN}, got {page_elems}")
    return max(1, -(-num_elems // page_elems))
