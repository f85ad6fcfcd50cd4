"""Requests that wait: in the policy's order, or parked until their adapter arrives."""

from bisect import bisect_left, insort
from collections.abc import Hashable

from loraplex.scheduler.request import Request


def _key(request: Request) -> tuple[int, ...]:
    return request.key


class WaitingQueue:
    """A sorted list of requests that may start, and those parked on an event.

    Parked requests cost a step nothing and hold back nobody; when their event comes they return to
    the place that their key gives them.
    """

    def __init__(self) -> None:
        self._queue: list[Request] = []
        self._parked: dict[Hashable, dict[Request, None]] = {}
        self._num_parked = 0

    def __len__(self) -> int:
        return len(self._queue) + self._num_parked

    @property
    def num_parked(self) -> int:
        return self._num_parked

    @property
    def queue(self) -> list[Request]:
        """Requests that may start, first come first; change it through the methods only."""
        return self._queue

    def push(self, request: Request) -> None:
        insort(self._queue, request, key=_key)

    def push_all(self, requests: list[Request]) -> None:
        """Push many at once, in one linear merge."""
        self._queue.extend(requests)
        self._queue.sort(key=_key)

    def remove(self, request: Request) -> None:
        """Take out a request, wherever it waits."""
        if request.parked_on is not None:
            parked = self._parked[request.parked_on]
            del parked[request]
            if not parked:
                del self._parked[request.parked_on]
            request.parked_on = None
            self._num_parked -= 1
            return
        index = bisect_left(self._queue, request.key, key=_key)
        if index == len(self._queue) or self._queue[index] is not request:
            raise ValueError(f"request {request.request_id!r} does not wait")
        del self._queue[index]

    def replace_front(self, num_taken: int, kept: list[Request]) -> None:
        """Drop the first `num_taken` requests of the queue but those in `kept`."""
        self._queue[:num_taken] = kept

    def park(self, request: Request, event: Hashable) -> None:
        """Set aside a request that is not in the queue until unpark(event)."""
        request.parked_on = event
        self._parked.setdefault(event, {})[request] = None
        self._num_parked += 1

    def unpark(self, event: Hashable) -> list[Request]:
        """Hand back all requests parked on `event`; they are in no queue then."""
        requests = list(self._parked.pop(event, ()))
        for request in requests:
            request.parked_on = None
        self._num_parked -= len(requests)
        return requests
