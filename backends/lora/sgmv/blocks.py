"""Block sizes of the Triton SGMV kernels: measured ones where there are, else sensible ones.

`benchmarks/kernels/tune_sgmv.py` measures candidates on a GPU and writes sgmv_tuned.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from loraplex.backends.lora.sgmv.tuned import TUNED

Regime = Literal["decode", "prefill"]

RANK_CLASSES = (16, 32, 64, 256)
"""A prefill takes the first class that its largest rank does not pass; a decode step the first,
whatever its ranks, since its kernels may not depend on the batch."""


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    rows: int  # of a tile
    max_ranks: int  # of an item; fewer where all modules of the group have fewer together
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
    """What measured best for one regime, rank class and size of group.

    `features` is the group's in_features for shrink, its columns for expand; groups in between
    take the nearest.
    """

    shrink: dict[tuple[Regime, int, int], ShrinkBlocks] = field(default_factory=dict)
    expand: dict[tuple[Regime, int, int], ExpandBlocks] = field(default_factory=dict)


def rank_class(regime: Regime, largest_rank: int) -> int:
    """The class that a step of this regime belongs to."""
    if regime == "decode":
        return RANK_CLASSES[0]
    return next(size for size in RANK_CLASSES if largest_rank <= size)


def tuned_for(capability: tuple[int, int] | None) -> Tuned:
    """The measurements of this compute capability; empty for one that was not measured."""
    return as_tuned(TUNED.get(capability, ()) if capability is not None else ())


def as_tuned(rows: Iterable[tuple[Any, ...]]) -> Tuned:
    """Rows as sgmv_tuned.py has them."""
    tuned = Tuned()
    for kernel, regime, ranks, features, sizes in rows:
        if kernel == "shrink":
            tuned.shrink[regime, ranks, features] = ShrinkBlocks(*sizes)
        else:
            tuned.expand[regime, ranks, features] = ExpandBlocks(*sizes)
    return tuned


def shrink_blocks(tuned: Tuned, regime: Regime, ranks: int, features: int) -> ShrinkBlocks:
    """Measured for the nearest size, else the default. `ranks` is a rank class."""
    key = _nearest(list(tuned.shrink), regime, ranks, features)
    if key is not None:
        return tuned.shrink[key]
    if regime == "decode":
        return ShrinkBlocks(rows=16, max_ranks=16, warps=2, stages=8, waves=6)
    if ranks <= 32:
        return ShrinkBlocks(rows=64, max_ranks=64, warps=4, stages=5, waves=2)
    return ShrinkBlocks(rows=64, max_ranks=128, warps=4, stages=4, waves=2)


def expand_blocks(tuned: Tuned, regime: Regime, ranks: int, features: int) -> ExpandBlocks:
    """Measured for the nearest size, else the default. `ranks` is a rank class."""
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
    """The measured key of this regime and rank class whose features are nearest, as a ratio."""
    fitting = [key for key in keys if key[:2] == (regime, ranks)]

    def distance(key: tuple[Regime, int, int]) -> float:
        return max(key[2], features) / min(key[2], features)

    return min(fitting, key=distance, default=None)
