"""Block sizes of the Triton SGMV kernels: measured ones if there are any, else defaults.

`benchmarks/kernels/tune_sgmv.py` measures candidates on a GPU and writes tuned.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from loraplex.backends.lora.sgmv.tuned import TUNED

Regime = Literal["decode", "prefill"]

RANK_CLASSES = (16, 32, 64, 256)
"""A prefill takes the first class that its largest rank does not pass. A decode step always takes
the first class, since its kernels may not depend on the batch."""


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    rows: int  # of a tile
    max_ranks: int  # of an item; fewer if the group's modules have fewer ranks together
    warps: int
    stages: int  # of the pipeline over chunks of 64 input features
    waves: int  # programs wanted for each multiprocessor


@dataclass(frozen=True, slots=True)
class ExpandBlocks:
    rows: int  # of a tile
    columns: int
    ranks: int
    warps: int
    max_registers: int  # of a thread
    waves: int
    max_panel: int  # blocks of columns that one unit takes at most


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest measured blocks, by regime, rank class and features.

    `features` are the group's in_features for shrink, its columns for expand. A group that was not
    measured takes the nearest.
    """

    shrink: dict[tuple[Regime, int, int], ShrinkBlocks] = field(default_factory=dict)
    expand: dict[tuple[Regime, int, int], ExpandBlocks] = field(default_factory=dict)


def rank_class(regime: Regime, largest_rank: int) -> int:
    """Returns the class of RANK_CLASSES of a step in this regime."""
    if regime == "decode":
        return RANK_CLASSES[0]
    return next(size for size in RANK_CLASSES if largest_rank <= size)


def tuned_for(capability: tuple[int, int] | None) -> Tuned:
    """Returns the measurements of this compute capability; empty if there are none."""
    return as_tuned(TUNED.get(capability, ()) if capability is not None else ())


def as_tuned(rows: Iterable[tuple[Any, ...]]) -> Tuned:
    """Returns rows of tuned.py by their keys."""
    tuned = Tuned()
    for kernel, regime, ranks, features, sizes in rows:
        if kernel == "shrink":
            tuned.shrink[regime, ranks, features] = ShrinkBlocks(*sizes)
        else:
            tuned.expand[regime, ranks, features] = ExpandBlocks(*sizes)
    return tuned


def shrink_blocks(tuned: Tuned, regime: Regime, ranks: int, features: int) -> ShrinkBlocks:
    """Returns the blocks measured for the nearest size, else defaults. `ranks` is a rank class."""
    key = _nearest(list(tuned.shrink), regime, ranks, features)
    if key is not None:
        return tuned.shrink[key]
    if regime == "decode":
        return ShrinkBlocks(rows=16, max_ranks=16, warps=2, stages=8, waves=6)
    if ranks <= 32:
        return ShrinkBlocks(rows=64, max_ranks=64, warps=4, stages=5, waves=2)
    return ShrinkBlocks(rows=64, max_ranks=128, warps=4, stages=4, waves=2)


def expand_blocks(tuned: Tuned, regime: Regime, ranks: int, features: int) -> ExpandBlocks:
    """Returns the blocks measured for the nearest size, else defaults. `ranks` is a rank class."""
    key = _nearest(list(tuned.expand), regime, ranks, features)
    if key is not None:
        return tuned.expand[key]
    if regime == "decode":
        return ExpandBlocks(
            rows=16, columns=128, ranks=16, warps=4, max_registers=128, waves=4, max_panel=16
        )
    return ExpandBlocks(
        rows=64,
        columns=128,
        ranks=min(ranks, 64),
        warps=8,
        max_registers=128,
        waves=4,
        max_panel=8,
    )


def _nearest(
    keys: list[tuple[Regime, int, int]], regime: Regime, ranks: int, features: int
) -> tuple[Regime, int, int] | None:
    """Returns the measured key of this regime and rank class whose features are nearest, as a
    ratio."""
    fitting = [key for key in keys if key[:2] == (regime, ranks)]

    def distance(key: tuple[Regime, int, int]) -> float:
        return max(key[2], features) / min(key[2], features)

    return min(fitting, key=distance, default=None)
