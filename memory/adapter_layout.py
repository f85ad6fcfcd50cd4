"""The layout of an adapter's weights in its pages. Plain integers, no torch.

In every layer an adapter is one virtual array of elements: for each of its modules r rows of A,
each `in_features` long, then r rows of B transposed, each `out_features` long. The array is cut
into the adapter's pages in order, so element e lies in page `page_ids[e // page_elems]` at
`e % page_elems`. Ranks may differ from layer to layer; the pages must hold the largest layer.
"""

from dataclasses import dataclass

ROW_ALIGN = 64
"""Rows start at multiples of this many elements, so no aligned vector load crosses a page. The LoRA
kernels get it with each LoRAGroup."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections that an adapter may change. The index in this tuple is the module's id."""


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Sizes of one projection on one worker, which is a shard under tensor parallelism."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """Element offsets of a module's A and B rows in the layer's virtual array."""

    rank: int
    a_start: int
    b_start: int


def align(num_elems: int) -> int:
    """Round up to a whole number of aligned rows."""
    return -(-num_elems // ROW_ALIGN) * ROW_ALIGN


def place_layer(
    ranks: dict[int, int], shapes: tuple[ModuleShape, ...]
) -> tuple[dict[int, ModulePlace], int]:
    """Lay out one layer: `ranks` maps module id to rank. Returns the places and the elements used.

    Row i of A starts at `a_start + i * align(in_features)`, row i of B transposed at
    `b_start + i * align(out_features)`.
    """
    places: dict[int, ModulePlace] = {}
    offset = 0
    for module in sorted(ranks):
        rank, shape = ranks[module], shapes[module]
        b_start = offset + rank * align(shape.in_features)
        places[module] = ModulePlace(rank=rank, a_start=offset, b_start=b_start)
        offset = b_start + rank * align(shape.out_features)
    return places, offset


def num_pages(
    layer_ranks: list[dict[int, int]], shapes: tuple[ModuleShape, ...], page_elems: int
) -> int:
    """Return the pages that an adapter with these ranks per layer needs, at least one."""
    if page_elems % ROW_ALIGN:
        raise ValueError(f"page_elems must be a multiple of {ROW_ALIGN}, got {page_elems}")
    largest = max((place_layer(ranks, shapes)[1] for ranks in layer_ranks), default=0)
    return max(1, -(-largest // page_elems))
