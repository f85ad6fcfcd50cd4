"""Estimates which share of the cluster's work each adapter asks for."""

import math

HALF_LIFE_S = 60.0
HEADROOM = 1.25  # candidates per engine's worth of demand
SHRINK_MARGIN = 0.5  # engines; a candidate is given up once demand is this far under the count
FORGOTTEN = 1e-3  # share of an engine under which an adapter's demand is dropped


class AdapterDemand:
    """Exponentially decayed tokens of each adapter, and the number of engines that they need.

    The number grows as soon as demand asks for it. It shrinks only when demand is
    `SHRINK_MARGIN` engines under it, so a demand that varies around a bound does not flap.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._origin = 0.0  # weights are scaled to this time
        self._weights: dict[str, float] = {}
        self._total = 0.0
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def observe(self, content_hash: str, num_tokens: int, now: float) -> None:
        """Count a request; `now` never goes back."""
        if now - self._origin > 16 * self._half_life_s:
            self._rescale(now)
        weight = num_tokens * 2.0 ** ((now - self._origin) / self._half_life_s)
        self._weights[content_hash] = self._weights.get(content_hash, 0.0) + weight
        self._total += weight

    def share(self, content_hash: str) -> float:
        """Returns the adapter's part of all recent tokens."""
        return self._weights.get(content_hash, 0.0) / self._total if self._total else 0.0

    def num_candidates(self, content_hash: str, num_engines: int) -> int:
        """Returns how many of `num_engines` engines may hold the adapter: at least 1."""
        wanted = self.share(content_hash) * num_engines * HEADROOM
        count = self._counts.get(content_hash, 1)
        if wanted > count or wanted < count - 1 - SHRINK_MARGIN:
            count = max(1, math.ceil(wanted))
        count = max(1, min(count, num_engines))
        if count > 1:
            self._counts[content_hash] = count
        else:
            self._counts.pop(content_hash, None)
        return count

    def _rescale(self, now: float) -> None:
        scale = 2.0 ** ((self._origin - now) / self._half_life_s)
        least = FORGOTTEN * self._total * scale
        self._weights = {
            content_hash: weight * scale
            for content_hash, weight in self._weights.items()
            if weight * scale >= least
        }
        self._counts = {key: count for key, count in self._counts.items() if key in self._weights}
        self._total = sum(self._weights.values())
        self._origin = now
