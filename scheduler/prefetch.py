"""Adapters of requests that wait are loaded before the requests can start.

A load takes from a millisecond to some tens; one begun while its request waits for a seat or for
pages costs that request nothing. Nobody else must pay for it, so a load goes ahead only if

- pages are left for what running requests grow by during a load, and for all requests before it in
  the policy's order, which could therefore all start at once if they had seats. Where the first
  request lacks room itself, only its own adapter is loaded: those pages it needs in any case;
- what is evicted for it is idle, of a lower eviction priority than the adapter will have, and not
  the adapter of another request within the look-ahead.

Until it is loaded an adapter's pages are nobody's to take; then it is idle like any other, and can
be evicted. A request has its adapter loaded ahead at most once, so that two never push each other
out in turns.
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
"""Requests of the order that are looked at: more than start during a load. Further ahead the order
may still change, and pages would lie idle until it is their turn."""

MAX_LOADS = 4
"""Loads in flight, of any kind, at which none is begun ahead. Loads go over the link one after the
other, and one that a request waits for must not queue behind many that nobody needs yet: at 80 MB
an adapter, four are 6 ms."""

LOAD_STEPS = 8
"""Steps for which running requests have pages to grow by: more than a load from disk takes."""


class Prefetcher:
    """Chooses the loads; `begin` has one done, for which room has been made."""

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
        self._num_waiting = 0  # when it looked last
        self.is_stale = True  # something has changed since it looked last

    def run(self, context: Context, *, running: RunningRequests, num_loading: int) -> None:
        """Begin the loads that nobody pays for; costs O(LOOK_AHEAD), or nothing if all is as it
        was the last time.

        Args:
            context: as for an admission that has seats to give.
            num_loading: adapters being loaded.
        """
        num_waiting = min(LOOK_AHEAD, len(self._waiting.by_age))
        if num_loading >= MAX_LOADS or not (self.is_stale or num_waiting != self._num_waiting):
            return
        self.is_stale, self._num_waiting = False, num_waiting
        window = list(islice(self._policy.order(self._waiting, context), LOOK_AHEAD))
        memory, counted = self._memory, set[str]()
        num_growth: int | None = None
        num_needed = 0  # by those before
        for request in window:
            version = request.adapter_version
            if version is not None and version.content_hash not in counted:
                counted.add(version.content_hash)
                adapter = memory.adapters.get(version.content_hash)
                if adapter is None:
                    if num_growth is None:
                        num_growth = self._growth(running)
                    room = memory.num_available - num_growth - num_needed
                    if num_loading >= MAX_LOADS or room < version.num_pages:
                        return
                    if not self._load(request, version, window, context.now):
                        return
                    num_loading += 1
                elif adapter.is_idle:
                    num_needed += len(adapter.page_ids)
            num_needed += memory.kv.num_pages_for(len(request.token_ids)) + 1
            if request is window[0]:
                num_needed += len(running)  # that admission keeps free
            if num_needed > memory.num_available:
                return

    def _growth(self, running: RunningRequests) -> int:
        """Pages that the running requests may take during a load."""
        num_pages_for = self._memory.kv.num_pages_for
        return sum(
            num_pages_for(num_tokens - request.capacity)
            for request in running
            if (num_tokens := min(request.num_total + LOAD_STEPS, request.max_total))
            > request.capacity
        )

    def _load(
        self, request: Request, version: AdapterVersion, window: list[Request], now: float
    ) -> bool:
        if request.was_prefetched or not self._make_room(version, window):
            return False
        request.was_prefetched = True
        self._begin(version, now)
        return True

    def _make_room(self, version: AdapterVersion, window: list[Request]) -> bool:
        """Free a slot and pages at the cost of what is cheaper to bring back."""
        memory, num_pages = self._memory, version.num_pages
        cost_ns = memory.adapters.load_cost_ns(version.content_hash, version.num_bytes)
        below = memory.clock.stamp(cost_ns, num_pages)
        if memory.adapters.num_free_slots and num_pages <= memory.num_free:
            return True
        soon_used = {
            other.adapter_version.content_hash for other in window if other.adapter_version
        }
        kept = [a for h in sorted(soon_used) if (a := memory.adapters.get(h)) and a.is_idle]
        for adapter in kept:
            memory.adapters.pin(adapter.content_hash)
        has_room = memory.make_adapter_slot(below=below) and memory.make_room(
            num_pages, below=below
        )
        for adapter in kept:
            memory.adapters.unpin(adapter.content_hash, adapter.last_use)
        return has_room
