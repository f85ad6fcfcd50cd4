"""Counts the look-ups, downloads and evictions of a frontend's stores."""

import threading
from typing import Any

from loraplex.scheduler.statistics.bucket_counts import BucketCounts, zeros

LOOKUP_RESULTS = ("found", "missing", "refused", "unavailable")
DOWNLOAD_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""Upper bounds of the buckets of download times, in seconds."""

_COUNTERS = (*LOOKUP_RESULTS, "download_bytes", "failed_downloads", "evictions")


class StoreCounts:
    """Adds up what the threads of one process report. Any process may read the numbers."""

    NUM_CELLS = len(_COUNTERS) + BucketCounts.num_cells(DOWNLOAD_S)

    def __init__(self, cells: "memoryview[float] | None" = None) -> None:
        """Goes on with what `cells` hold; None: nothing was counted before."""
        self._cells = zeros(self.NUM_CELLS) if cells is None else cells
        self._seconds = BucketCounts(DOWNLOAD_S, self._cells[len(_COUNTERS) :])
        self._lock = threading.Lock()

    def count_lookup(self, result: str) -> None:
        """Counts a look-up that asked the stores; `result` is one of LOOKUP_RESULTS."""
        self._add(result, 1)

    def count_download(self, seconds: float, num_bytes: int) -> None:
        """Counts a download that is complete."""
        self._add("download_bytes", num_bytes)
        with self._lock:
            self._seconds.observe(seconds)

    def count_failed_download(self) -> None:
        """Counts a download that ended before it was complete."""
        self._add("failed_downloads", 1)

    def count_eviction(self) -> None:
        """Counts an adapter that left the cache to make room."""
        self._add("evictions", 1)

    def snapshot(self) -> dict[str, Any]:
        """Returns the number of `lookups` by result, `download_seconds` as
        BucketCounts.snapshot(), `download_bytes`, `failed_downloads` and `evictions`."""
        values = dict(zip(_COUNTERS, map(int, self._cells), strict=False))
        lookups = {result: values.pop(result) for result in LOOKUP_RESULTS}
        return {"lookups": lookups, "download_seconds": self._seconds.snapshot(), **values}

    def _add(self, name: str, number: int) -> None:
        with self._lock:
            self._cells[_COUNTERS.index(name)] += number
