"""Says now and then how a busy engine does."""

import time
from collections.abc import Callable
from typing import Any

INTERVAL_S = 10.0


class StatusLine:
    """Makes a line at most every INTERVAL_S seconds, and none while the engine is idle.

    A last line comes after the last request has ended.
    """

    def __init__(
        self, stats: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stats` returns Scheduler.stats()."""
        self._stats = stats
        self._clock = clock
        self._busy_since: float | None = None  # start of the interval; None: idle
        self._num_generated = self._num_scheduled = 0

    @property
    def due_s(self) -> float | None:
        """Seconds until take() should be called even if nothing happens; None: no need."""
        if self._busy_since is None:
            return None
        return max(0.0, self._busy_since + INTERVAL_S - self._clock())

    def take(self, num_unfinished: int) -> str | None:
        """Returns a line if one is due. Call it after each turn of the loop."""
        now = self._clock()
        if self._busy_since is None:
            if num_unfinished:
                self._busy_since = now
            return None
        if now < self._busy_since + INTERVAL_S:
            return None
        stats, seconds = self._stats(), now - self._busy_since
        generated = (stats["num_generated_tokens"] - self._num_generated) / seconds
        scheduled = (stats["num_scheduled_tokens"] - self._num_scheduled) / seconds
        self._num_generated = stats["num_generated_tokens"]
        self._num_scheduled = stats["num_scheduled_tokens"]
        self._busy_since = now if num_unfinished else None
        return (
            f"{stats['running']:,} running, {stats['waiting']:,} waiting; "
            f"{generated:,.0f} new tokens/s, {scheduled:,.0f} computed; "
            f"{stats['pages_free']:,} of {stats['num_pages']:,} pages free, "
            f"{stats['pages_prefix']:,} cached; "
            f"{stats['num_resident_adapters']:,} adapters in pages"
        )
