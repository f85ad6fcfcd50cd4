"""First come, first served, after the requests' priorities."""

import math
from collections.abc import Hashable, Iterator

from loraplex.scheduler.policies.policy import Context, Policy, WaitingView, aged_prefix
from loraplex.scheduler.request import Rank, Request


class FirstComeFirstServed(Policy):
    """Serves lower priority numbers first, then in order of arrival.

    Bound: once a request has waited `max_wait_s`, nothing that arrived later starts before it.
    """

    admitted_first = False  # the order of keys never changes

    def __init__(self, *, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s

    def flow(self, request: Request) -> Hashable:
        return None

    def key(self, request: Request) -> Rank:
        return (request.priority, request.order)

    def rank(self, request: Request, now: float) -> Rank:
        """Rank an aged request before all others, or it would be preempted first."""
        aged = now - request.arrival >= self._max_wait_s
        return (-math.inf, request.order) if aged else request.key

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        now, max_wait_s = context.now, self._max_wait_s
        yield from aged_prefix(view.by_age, now=now, max_wait_s=max_wait_s)
        for request in view.flows.get(None, ()):
            if now - request.arrival < max_wait_s:
                yield request
