"""The order in which a router places the requests that wait for an engine."""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from loraplex.engine.router.routed_request import RoutedRequest
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policies.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT

MIN_KNOWN = 1024  # clients remembered before any is forgotten


class RouterQueue(Protocol):
    """Holds requests. One that ends meanwhile stays until it comes first."""

    def push(self, request: RoutedRequest) -> None:
        """Adds a request."""

    def first(self) -> RoutedRequest | None:
        """Returns the request to place next."""

    def pop(self) -> None:
        """Removes the request that first() returns."""

    def on_sent(self, request: RoutedRequest) -> None:
        """Counts a request that goes to an engine, the first time."""

    def on_tokens(self, request: RoutedRequest, count: int) -> None:
        """Counts tokens that a request has generated."""

    def __iter__(self) -> Iterator[RoutedRequest]: ...


def make_waiting_queue(config: SchedulerConfig) -> RouterQueue:
    """Returns the queue for the engines' policy: fair for "vtc", by priority for all others."""
    if config.policy == "vtc":
        return FairQueue(by_adapter=config.fair_share_by == "adapter", weights=config.weights)
    return PriorityQueue()


class PriorityQueue:
    """Orders by priority, the lower number first, then by arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, RoutedRequest]] = []

    def push(self, request: RoutedRequest) -> None:
        heapq.heappush(self._heap, (request.message.priority, request.order, request))

    def first(self) -> RoutedRequest | None:
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        heapq.heappop(self._heap)

    def on_sent(self, request: RoutedRequest) -> None: ...

    def on_tokens(self, request: RoutedRequest, count: int) -> None: ...

    def __iter__(self) -> Iterator[RoutedRequest]:
        return (entry[2] for entry in self._heap)


@dataclass(slots=True)
class _Client:
    weight: float
    counter: float = 0.0  # service received, divided by the weight
    queue: list[tuple[int, RoutedRequest]] = field(default_factory=list)  # a heap, by arrival
    is_queued: bool = False  # it has an entry in the heap of clients


class FairQueue:
    """Takes a request of the client (tenant or adapter) that got the least service per weight.

    Virtual token counters, as in the scheduler's policy `vtc` (Sheng et al., OSDI 2024, arXiv
    2401.00588), over all engines. Requests that an engine has given back go first. Takes O(log n).
    """

    def __init__(self, *, by_adapter: bool, weights: Mapping[str, float]) -> None:
        self._by_adapter = by_adapter
        self._weights = weights
        self._clients: dict[str, _Client] = {}
        self._max_known = MIN_KNOWN
        self._heap: list[tuple[float, str]] = []  # counters only grow, so an old entry is too low
        self._given_back: list[tuple[int, RoutedRequest]] = []  # a heap, by arrival
        self._last_left = 0.0  # counter of the client that stopped waiting last

    def push(self, request: RoutedRequest) -> None:
        if request.was_sent:
            heapq.heappush(self._given_back, (request.order, request))
            return
        name = self._name(request)
        client = self._client(name)
        heapq.heappush(client.queue, (request.order, request))
        if not client.is_queued:  # it has saved up no service while it was away
            client.counter = max(client.counter, self._least())
            client.is_queued = True
            heapq.heappush(self._heap, (client.counter, name))

    def first(self) -> RoutedRequest | None:
        if self._given_back:
            return self._given_back[0][1]
        client = self._next_client()
        return client.queue[0][1] if client else None

    def pop(self) -> None:
        if self._given_back:
            heapq.heappop(self._given_back)
        elif (client := self._next_client()) is not None:
            heapq.heappop(client.queue)

    def on_sent(self, request: RoutedRequest) -> None:
        client = self._client(self._name(request))
        client.counter += PROMPT_WEIGHT * len(request.message.prompt_token_ids) / client.weight

    def on_tokens(self, request: RoutedRequest, count: int) -> None:
        client = self._client(self._name(request))
        client.counter += OUTPUT_WEIGHT * count / client.weight

    def __iter__(self) -> Iterator[RoutedRequest]:
        yield from (request for _, request in self._given_back)
        for client in self._clients.values():
            yield from (request for _, request in client.queue)

    def _name(self, request: RoutedRequest) -> str:
        message = request.message
        return message.adapter if self._by_adapter else message.tenant or message.salt

    def _next_client(self) -> _Client | None:
        """Returns the client with the least counter of those that wait."""
        while self._heap:
            counter, name = self._heap[0]
            client = self._clients[name]
            if not client.queue:
                heapq.heappop(self._heap)
                client.is_queued = False
                self._last_left = client.counter
            elif counter != client.counter:
                heapq.heapreplace(self._heap, (client.counter, name))
            else:
                return client
        return None

    def _least(self) -> float:
        client = self._next_client()
        return client.counter if client else self._last_left

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            if len(self._clients) >= self._max_known:
                self._forget()
            client = _Client(self._weights.get(name, 1.0))
            self._clients[name] = client
        return client

    def _forget(self) -> None:
        """Forget clients that would be lifted anyway. Amortized O(1), as the limit doubles."""
        least = self._least()
        self._clients = {
            name: client
            for name, client in self._clients.items()
            if client.is_queued or client.counter > least
        }
        self._max_known = max(MIN_KNOWN, 2 * len(self._clients))
