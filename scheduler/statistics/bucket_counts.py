"""Counts values in buckets."""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any


def zeros(count: int) -> "memoryview[float]":
    """Returns `count` float64 in new memory."""
    return memoryview(array("d", bytes(8 * count)))


class BucketCounts:
    """The number of values up to each bound, and the sum of all values."""

    __slots__ = ("_bounds", "_cells")

    def __init__(self, bounds: Sequence[float], cells: "memoryview[float] | None" = None) -> None:
        """Goes on with what `cells` holds.

        Args:
            bounds: upper bounds of the buckets, in rising order. A last bucket takes the rest.
            cells: float64 [num_cells(bounds)]: the count of each bucket, then the sum. None: new
                ones, all zero.
        """
        self._bounds = bounds
        self._cells = zeros(self.num_cells(bounds)) if cells is None else cells

    @staticmethod
    def num_cells(bounds: Sequence[float]) -> int:
        return len(bounds) + 2

    def observe(self, value: float) -> None:
        self._cells[bisect_left(self._bounds, value)] += 1
        self._cells[-1] += value

    def snapshot(self) -> dict[str, Any]:
        """Returns `sum`, `count` and `buckets`.

        A bucket's key is its upper bound as text, the last one "+Inf". Its value counts all values
        up to that bound.
        """
        buckets: dict[str, int] = {}
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._cells, strict=False):
            total += int(count)
            buckets[bound] = total
        return {"sum": self._cells[-1], "count": total, "buckets": buckets}
