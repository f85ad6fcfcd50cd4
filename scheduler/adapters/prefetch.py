"""Prefetch: loads adapters of waiting requests before the requests can start.

A load takes from a millisecond to some tens. If it begins while its request waits for a slot or for
pages, it costs that request nothing. It must cost no other request anything either, so a load
begins ahead only if

- enough pages stay available for the growth of running requests during a load, and for all requests
  before it in the policy's order, as if they all started at once. Where the first request lacks
  room itself, only its own adapter is loaded: it needs those pages in any case;
- it evicts only what is idle, has a lower eviction priority than the adapter will have, and is not
  the adapter of another request within the look-ahead.

An adapter that was loaded ahead is idle like any other once its load is answered. Each request has
its adapters loaded ahead at most once, so two requests cannot evict each other's in turns.
"""

from collections.abc import Callable
from itertools import islice

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.policies.policy import Context, Policy
from loraplex.scheduler.request import Request
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.waiting_queue import WaitingQueue

LOOK_AHEAD = 16
"""Requests of the order that are considered: more than start during a load. Further ahead the order
may still change, and the pages would be unused for long."""

MAX_LOADS = 4
"""Loads in flight, of any kind, at which none begins ahead. Loads are copied one after the other,
and a load that a request waits for must not queue behind many: at 80 MB an adapter, four take
6 ms."""

LOAD_STEPS = 8
"""Steps for which running requests keep pages to grow: more than a load from disk takes."""


class Prefetcher:
    """Chooses the loads; `begin` starts one, for which room has been made."""

    def __init__(
        self,
        *,
        memory: PageManager,
        waiting: WaitingQueue,
        policy: Policy,
        begin: Callable[[AdapterVersion, float], None],
    ) -> None:
        self._memory = memory
        self._waiting = waiting
        self._policy = policy
        self._begin = begin
        self._num_waiting = 0  # at the last run
        self.is_stale = True  # something has changed since the last run

    def run(self, context: Context, *, running: RunningRequests, num_loading: int) -> None:
        """Begin the loads that delay no other request.

        Takes O(LOOK_AHEAD), or O(1) if nothing has changed since the last run.

        Args:
            context: the context of an admission that has free slots.
            num_loading: adapters being loaded.
        """
        num_waiting = min(LOOK_AHEAD, len(self._waiting.by_age))
        if num_loading >= MAX_LOADS or not (self.is_stale or num_waiting != self._num_waiting):
            return
        self.is_stale, self._num_waiting = False, num_waiting
        window = list(islice(self._policy.order(self._waiting, context), LOOK_AHEAD))
        memory, counted = self._memory, set[str]()
        num_growth: int | None = None
        num_needed = 0  # by the requests before
        for request in window:
            missing, num_idle_pages = self._look_at(request, counted)
            num_needed += num_idle_pages
            if missing:
                if num_growth is None:
                    num_growth = self._growth(running)
                room = memory.num_available - num_growth - num_needed
                if num_loading >= MAX_LOADS or room < sum(v.num_pages for v in missing):
                    return
                if not self._load(request, missing, window, context.now):
                    return
                num_loading += len(missing)
            num_needed += memory.kv.num_pages_for(len(request.token_ids)) + 1
            if request is window[0]:
                num_needed += len(running)  # that admission keeps free
            if num_needed > memory.num_available:
                return

    def _look_at(self, request: Request, counted: set[str]) -> tuple[list[AdapterVersion], int]:
        """Return the request's missing adapters and the pages of its idle ones, if not in `counted`
        already; add them to it."""
        missing: list[AdapterVersion] = []
        num_idle_pages = 0
        for content_hash, version in request.versions.items():
            if content_hash not in counted:
                counted.add(content_hash)
                adapter = self._memory.adapters.get(content_hash)
                if adapter is None:
                    missing.append(version)
                elif adapter.is_idle:
                    num_idle_pages += len(adapter.page_ids)
        return missing, num_idle_pages

    def _growth(self, running: RunningRequests) -> int:
        """Count the pages that running requests may take during a load."""
        num_pages_for = self._memory.kv.num_pages_for
        return sum(
            num_pages_for(num_tokens - request.capacity)
            for request in running
            if (num_tokens := min(request.num_total + LOAD_STEPS, request.max_total))
            > request.capacity
        )

    def _load(
        self, request: Request, missing: list[AdapterVersion], window: list[Request], now: float
    ) -> bool:
        if request.was_prefetched:
            return False
        for version in missing:
            if not self._make_room(version, window):
                return False
            request.was_prefetched = True
            self._begin(version, now)
        return True

    def _make_room(self, version: AdapterVersion, window: list[Request]) -> bool:
        """Free a slot and pages by evicting only what is cheaper to bring back."""
        memory, num_pages = self._memory, version.num_pages
        cost_ns = memory.adapters.load_cost_ns(version.content_hash, version.num_bytes)
        below = memory.clock.stamp(cost_ns, num_pages)
        if memory.adapters.num_free_slots and num_pages <= memory.num_free:
            return True
        soon_used = {content_hash for other in window for content_hash in other.versions}
        kept = [a for h in sorted(soon_used) if (a := memory.adapters.get(h)) and a.is_idle]
        for adapter in kept:
            memory.adapters.reserve(adapter.content_hash)
        has_room = memory.make_adapter_slot(below=below) and memory.make_room(
            num_pages, below=below
        )
        for adapter in kept:
            memory.adapters.unreserve(adapter.content_hash, adapter.last_use)
        return has_room
