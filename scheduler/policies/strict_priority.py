"""Priorities that age while a request waits."""

from collections.abc import Hashable, Iterator

from loraplex.scheduler.policies.policy import Context, Policy, WaitingView
from loraplex.scheduler.request import Rank, Request


class StrictPriority(Policy):
    """Serves by priority, where each `max_wait_s` of waiting makes up for one level.

    All requests age alike, so their order never changes: it is that of `arrival + max_wait_s *
    priority`. Bound: a request of priority p lets one of priority q < p go first only if that
    arrived less than `max_wait_s * (p - q)` after it, and one of q >= p only if it came before.
    """

    admitted_first = False

    def __init__(self, *, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s

    def flow(self, request: Request) -> Hashable:
        return None

    def key(self, request: Request) -> Rank:
        return (request.arrival + self._max_wait_s * request.priority, request.order)

    def rank(self, request: Request, now: float) -> Rank:
        return request.key

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        return iter(view.flows.get(None, ()))
