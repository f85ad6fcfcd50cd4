"""First come, first served, in turns of the clients, after the requests' priorities."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.policies.policy import Context, Policy, WaitingView, aged_prefix
from loraplex.scheduler.request import Rank, Request


class FirstComeFirstServed(Policy):
    """Serves lower priority numbers first, then by turns, then in order of arrival.

    A request takes a turn when it arrives: the one after that of its client's last waiting request,
    at the earliest the next one. So a client with many waiting requests does not hold up the others
    (start-time fair queueing, Goyal et al., SIGCOMM 1996, where each request has the length 1). The
    requests of one client, or of clients that have one waiting each, are served as they come. A
    client is a `requester`; those without one count as one client.

    While requests wait that have waited `max_wait_s`, every second admission goes to the oldest of
    them. So priorities count also in a queue that is longer than `max_wait_s`.

    Bounds:
    - A request of a client that had at most k others of its priority waiting at a time is admitted
      before the (k + 2)-th request of any other client that waits or comes later.
    - Once a request has waited `max_wait_s`, and n older ones wait, at most n + 1 later ones are
      admitted before it.
    """

    admitted_first = False  # the order of keys never changes

    def __init__(self, *, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._num_admitted = 0
        self._turn = 0  # the last one that was admitted
        self._last_turns: dict[Hashable, int] = {}  # of clients with requests never admitted
        self._num_waiting: Counter[Hashable] = Counter()  # requests never admitted, by client

    def on_arrival(self, request: Request, now: float) -> None:
        client = _client(request)
        self._last_turns[client] = int(request.key[1])
        self._num_waiting[client] += 1

    def on_admitted(self, request: Request, now: float) -> None:
        self._num_admitted += 1
        self._turn = max(self._turn, int(request.key[1]))
        self._leave(request)

    def on_end(self, request: Request) -> None:
        if request.admitted_at < 0:
            self._leave(request)

    def _leave(self, request: Request) -> None:
        client = _client(request)
        self._num_waiting[client] -= 1
        if not self._num_waiting[client]:
            del self._num_waiting[client], self._last_turns[client]

    def flow(self, request: Request) -> Hashable:
        return None

    def key(self, request: Request) -> Rank:
        turn = 1 + max(self._turn, self._last_turns.get(_client(request), 0))
        return (request.priority, turn, request.order)

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

    def check_integrity(self, requests: Iterable[Request]) -> None:
        waiting = Counter(_client(request) for request in requests if request.admitted_at < 0)
        if waiting != self._num_waiting or waiting.keys() != self._last_turns.keys():
            raise IntegrityError("the waiting requests of a client are counted wrongly")


def _client(request: Request) -> Hashable:
    """Return whose turns a request takes. Those of different priorities are counted apart."""
    return request.requester, request.priority


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
