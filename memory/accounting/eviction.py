"""The eviction order of idle adapters and idle prefix blocks.

The order is GreedyDual-Size (Cao and Irani, USENIX ITS 1997). Whatever becomes idle gets the stamp
``floor + cost / pages``, where the cost is the time to bring it back. The lowest stamp is evicted
first and raises the floor to its own value. So a stamp ages while others are evicted, and an
expensive tenant outlives a cheap one by as many evictions as it costs more. All are integers, so
every machine gives the same order.

The costs are those of a 7B to 8B model in bf16 on one H200. Only their ratio matters.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final

LOAD_FIXED_NS: Final = 1_000_000
"""Fixed cost of a load: messages both ways, the start of the copy, the wait for the next plan."""

READ_BYTES_PER_NS: Final = 7
"""Page cache to host store, checked and packed: 84 MB in 12 ms beside decode steps."""

COPY_BYTES_PER_NS: Final = 50
"""Host store to pages: 54.8 GB/s measured from page-locked memory, less the cost of small pages."""

PREFILL_NS_PER_TOKEN: Final = 25_000
"""Cost of computing a prompt token again: 13 GFLOP at 500 TFLOP/s."""

Priority = tuple[int, int]
"""(stamp in nanoseconds a page, number of the stamp). The lowest is evicted first; among equal
stamps the one that became idle first. No two are equal."""


def load_cost_ns(num_bytes: int, *, on_host: bool) -> int:
    """Estimate the time to load an adapter of `num_bytes` from the host store, or from disk."""
    read_ns = 0 if on_host else num_bytes // READ_BYTES_PER_NS
    return LOAD_FIXED_NS + num_bytes // COPY_BYTES_PER_NS + read_ns


def recompute_cost_ns(num_tokens: int) -> int:
    """Estimate the time to compute the KV of `num_tokens` again."""
    return num_tokens * PREFILL_NS_PER_TOKEN


class EvictionClock:
    """Stamps what becomes idle. All tenants of a pool share one clock."""

    def __init__(self) -> None:
        self._floor = 0
        self._num_stamps = 0

    def stamp(self, cost_ns: int, num_pages: int) -> Priority:
        """Return the priority of a tenant that becomes idle now.

        For equal cost and pages a later stamp is never lower than an earlier one.

        Args:
            cost_ns: time to bring it back.
            num_pages: pages that its eviction frees.
        """
        self._num_stamps += 1
        return self._floor + cost_ns // num_pages, self._num_stamps

    def adjust(
        self, priority: Priority, num_pages: int, *, old_cost_ns: int, cost_ns: int
    ) -> Priority:
        """Return what `stamp` would have given instead of `priority` for the cost `cost_ns`."""
        stamp, number = priority
        return stamp - old_cost_ns // num_pages + cost_ns // num_pages, number

    def advance(self, evicted: Priority) -> None:
        """Age everything that stays idle, after an eviction that made room."""
        self._floor = max(self._floor, evicted[0])


class EvictionQueue:
    """Idle adapters by priority. Each operation takes O(log n) on average.

    An adapter that is removed leaves a stale entry in the heap. The entry is dropped when it
    reaches the top, or when stale entries are the larger part of the heap.
    """

    def __init__(self) -> None:
        self._priorities: dict[str, Priority] = {}
        self._heap: list[tuple[Priority, str]] = []

    def __len__(self) -> int:
        return len(self._priorities)

    def __iter__(self) -> Iterator[str]:
        return iter(self._priorities)

    def add(self, key: str, priority: Priority) -> None:
        """Add `key`, which is not in the queue, with a priority that no other has."""
        self._priorities[key] = priority
        heappush(self._heap, (priority, key))

    def remove(self, key: str) -> Priority:
        """Remove `key` and return its priority."""
        priority = self._priorities.pop(key)
        if len(self._heap) > 2 * len(self._priorities) + 16:
            self._heap = [(priority, key) for key, priority in self._priorities.items()]
            heapify(self._heap)
        return priority

    def first(self) -> tuple[Priority, str] | None:
        """Return the entry to evict first."""
        while self._heap:
            priority, key = self._heap[0]
            if self._priorities.get(key) == priority:
                return priority, key
            heappop(self._heap)
        return None
