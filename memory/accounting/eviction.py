"""Which idle tenant gives up its pages next: cheap to bring back and long unused goes first.

The policy is GreedyDual-Size (Cao and Irani, USENIX ITS 1997): whatever falls idle is stamped with
``floor + cost / pages``, its cost being the time that brings it back; the lowest stamp is evicted,
and the floor rises to it. So a stamp ages as others are evicted, and something dear outlives
something cheap by as many evictions as it is dearer. Integers only, and the same on every machine.

The costs are those of a 7B to 8B model in bf16 on one H200. Only their ratio matters, and only as
far as one tenant's page is several times as dear as the other's.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final

EVICTION_POLICIES: Final = ("cost", "lru")

LOAD_FIXED_NS: Final = 1_000_000
"""Of any load: messages both ways, the start of the copy, and the wait for the next plan."""

READ_BYTES_PER_NS: Final = 7
"""Page cache to host memory, checked and packed: 84 MB in 12 ms beside decode steps."""

LINK_BYTES_PER_NS: Final = 50
"""Host memory to device: 54.8 GB/s measured with pinned memory, less what small pages cost."""

PREFILL_NS_PER_TOKEN: Final = 25_000
"""To compute a token of a prompt again: 13 GFLOP at 500 TFLOP/s."""

Priority = tuple[int, int]
"""(stamp in nanoseconds a page, number of the stamp): the lowest is evicted first, and of equals
the one that fell idle first. All are different."""


def load_cost_ns(num_bytes: int, *, in_host: bool) -> int:
    """Time to load an adapter of `num_bytes` from host memory, or else from disk."""
    read_ns = 0 if in_host else num_bytes // READ_BYTES_PER_NS
    return LOAD_FIXED_NS + num_bytes // LINK_BYTES_PER_NS + read_ns


def recompute_cost_ns(num_tokens: int) -> int:
    """Time to compute the KV of `num_tokens` again."""
    return num_tokens * PREFILL_NS_PER_TOKEN


class EvictionClock:
    """Stamps what falls idle; one clock serves all tenants of a pool.

    "lru" stamps all alike, so that only the order of falling idle is left.
    """

    def __init__(self, policy: str = "cost") -> None:
        if policy not in EVICTION_POLICIES:
            raise ValueError(f"eviction_policy must be one of {EVICTION_POLICIES}, got {policy!r}")
        self._uses_cost = policy == "cost"
        self._floor = 0
        self._num_stamps = 0

    def stamp(self, cost_ns: int, num_pages: int) -> Priority:
        """For something that falls idle now: `cost_ns` brings it back, `num_pages` it would free.

        For equal cost and pages, a later stamp is never lower than an earlier one.
        """
        self._num_stamps += 1
        stamp = self._floor + cost_ns // num_pages if self._uses_cost else 0
        return stamp, self._num_stamps

    def adjust(
        self, priority: Priority, num_pages: int, *, old_cost_ns: int, cost_ns: int
    ) -> Priority:
        """What `stamp` would have given instead of `priority`, had the cost been `cost_ns`."""
        if not self._uses_cost:
            return priority
        stamp, number = priority
        return stamp - old_cost_ns // num_pages + cost_ns // num_pages, number

    def advance(self, evicted: Priority) -> None:
        """Something was evicted for room, so all that stays idle is that much older."""
        self._floor = max(self._floor, evicted[0])


class IdleHeap:
    """Idle tenants by priority. Each operation is O(log n) on average.

    What leaves early stays in the heap as a stale entry until it surfaces, or until stale entries
    are the larger part.
    """

    def __init__(self) -> None:
        self._priorities: dict[str, Priority] = {}
        self._heap: list[tuple[Priority, str]] = []

    def __len__(self) -> int:
        return len(self._priorities)

    def __iter__(self) -> Iterator[str]:
        return iter(self._priorities)

    def add(self, key: str, priority: Priority) -> None:
        """`key` is not in; no other has this `priority`."""
        self._priorities[key] = priority
        heappush(self._heap, (priority, key))

    def remove(self, key: str) -> Priority:
        """Returns what it was added with."""
        priority = self._priorities.pop(key)
        if len(self._heap) > 2 * len(self._priorities) + 16:
            self._heap = [(priority, key) for key, priority in self._priorities.items()]
            heapify(self._heap)
        return priority

    def first(self) -> tuple[Priority, str] | None:
        """The one to evict first."""
        while self._heap:
            priority, key = self._heap[0]
            if self._priorities.get(key) == priority:
                return priority, key
            heappop(self._heap)
        return None
