"""First come, first served, after the requests' priorities."""

import math
from collections.abc import Hashable, Iterator

from loraplex.scheduler.policies.policy import Context, Policy, WaitingView, aged_prefix
from loraplex.scheduler.request import Rank, Request


class FirstComeFirstServed(Policy):
    """Serves lower priority numbers first, then in order of arrival.

    While requests wait that have waited `max_wait_s`, every second admission goes to the oldest of
    them. So priorities count also in a queue that is longer than `max_wait_s`. Bound: once a
    request has waited that long, and n older ones wait, at most n + 1 later ones are admitted
    before it.
    """

    admitted_first = False  # the order of keys never changes

    def __init__(self, *, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._num_admitted = 0

    def on_admitted(self, request: Request, now: float) -> None:
        self._num_admitted += 1

    def flow(self, request: Request) -> Hashable:
        return None

    def key(self, request: Request) -> Rank:
        return (request.priority, request.order)

    def rank(self, request: Request, now: float) -> Rank:
        """Rank an aged request before all others, or it would be preempted first."""
        aged = now - request.arrival >= self._max_wait_s
        return (-math.inf, request.order) if aged else request.key

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        aged = aged_prefix(view.by_age, now=context.now, max_wait_s=self._max_wait_s)
        lanes = [aged, iter(view.flows.get(None, ()))]
        is_turn_of_priority = self._num_admitted % 2 == 1
        if is_turn_of_priority:
            lanes.reverse()
        yield from _alternate(lanes)


def _alternate(lanes: list[Iterator[Request]]) -> Iterator[Request]:
    """Yields from two iterators in turns, and each request once."""
    seen: set[Request] = set()
    while lanes:
        lane = lanes.pop(0)
        for request in lane:
            if request not in seen:
                seen.add(request)
                yield request
                lanes.append(lane)
                break
