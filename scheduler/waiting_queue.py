"""The waiting requests: sorted by age and by flow, or parked until their adapter arrives."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from operator import attrgetter
from typing import Any

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.policies.policy import ADMITTED, Policy
from loraplex.scheduler.request import Request

_BULK = 32  # for this many pushes, sorting the lists once is cheaper

_order: Callable[[Request], Any] = attrgetter("order")
_key: Callable[[Request], Any] = attrgetter("key")
_rank: Callable[[Request], Any] = attrgetter("rank")


class WaitingQueue:
    """Keeps sorted lists of the requests that may start, and the requests parked on an event.

    Planning never looks at a parked request. After its event it returns to its place in the order.
    Read `by_age` and `flows`; change them through the methods only.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.by_age: list[Request] = []
        self.flows: dict[Hashable, list[Request]] = {}
        self._parked: dict[Hashable, dict[Request, None]] = {}
        self._num_parked = 0
        self._num_by_requester: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return len(self.by_age) + self._num_parked

    def __iter__(self) -> Iterator[Request]:
        """Iterates over the requests in order of age, then over the parked ones."""
        yield from self.by_age
        for parked in self._parked.values():
            yield from parked

    @property
    def num_parked(self) -> int:
        return self._num_parked

    def num_of(self, requester: Hashable) -> int:
        """Return how many of the requests, parked or not, are this requester's."""
        return self._num_by_requester[requester]

    def push(self, request: Request) -> None:
        insort(self._open_flow(request), request, key=_sort_key(request.flow))
        insort(self.by_age, request, key=_order)
        self._count(request, 1)

    def push_all(self, requests: list[Request]) -> None:
        if len(requests) < _BULK:
            for request in requests:
                self.push(request)
            return
        for request in requests:
            self._open_flow(request).append(request)
            self._count(request, 1)
        for flow in {request.flow for request in requests}:
            self.flows[flow].sort(key=_sort_key(flow))
        self.by_age.extend(requests)
        self.by_age.sort(key=_order)

    def remove(self, request: Request) -> None:
        """Take out a request that waits or is parked."""
        if request.parked_on is not None:
            parked = self._parked[request.parked_on]
            del parked[request]
            if not parked:
                del self._parked[request.parked_on]
            request.parked_on = None
            self._num_parked -= 1
            self._count(request, -1)
            return
        self.discard([request])

    def discard(self, requests: Iterable[Request]) -> None:
        """Take requests that run now, or are parked, out of the lists."""
        for request in requests:
            flow = self.flows[request.flow]
            _delete(flow, request, _sort_key(request.flow))
            if not flow:
                del self.flows[request.flow]
            _delete(self.by_age, request, _order)
            self._count(request, -1)

    def park(self, request: Request, event: Hashable) -> None:
        """Set a request aside until unpark(event). The caller takes it out of the lists."""
        request.parked_on = event
        self._parked.setdefault(event, {})[request] = None
        self._num_parked += 1
        self._count(request, 1)

    def unpark(self, event: Hashable) -> list[Request]:
        """Return all requests parked on `event`. They are in no list afterwards."""
        requests = list(self._parked.pop(event, ()))
        for request in requests:
            request.parked_on = None
            self._count(request, -1)
        self._num_parked -= len(requests)
        return requests

    def check_integrity(self) -> None:
        """Raise IntegrityError unless both views hold the same requests, in order, and the counts
        are theirs and those of the parked ones."""
        in_flows = [request for flow in self.flows.values() for request in flow]
        if sorted(in_flows, key=_order) != self.by_age or not all(self.flows.values()):
            raise IntegrityError("the views of the waiting requests differ, or are out of order")
        for name, flow in self.flows.items():
            if sorted(flow, key=_sort_key(name)) != flow:
                raise IntegrityError(f"flow {name!r} is out of order")
        parked = [request for group in self._parked.values() for request in group]
        if Counter(r.requester for r in [*self.by_age, *parked]) != self._num_by_requester:
            raise IntegrityError("the waiting requests of a requester are counted wrongly")

    def _count(self, request: Request, change: int) -> None:
        self._num_by_requester[request.requester] += change
        if not self._num_by_requester[request.requester]:
            del self._num_by_requester[request.requester]

    def _open_flow(self, request: Request) -> list[Request]:
        again = self._policy.admitted_first and request.admitted_at >= 0
        request.flow = ADMITTED if again else self._policy.flow(request)
        flow = self.flows.get(request.flow)
        if flow is None:
            flow = self.flows[request.flow] = []
            self._policy.on_flow(request)
        return flow


def _sort_key(flow: Hashable) -> Callable[[Request], Any]:
    return _rank if flow is ADMITTED else _key


def _delete(requests: list[Request], request: Request, key: Callable[[Request], Any]) -> None:
    index = bisect_left(requests, key(request), key=key)
    if index == len(requests) or requests[index] is not request:
        raise ValueError(f"request {request.request_id!r} does not wait")
    del requests[index]
