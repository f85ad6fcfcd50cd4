"""The router's books: every unfinished sequence, and which engine has it.

Invariant: each sequence either waits or is at one engine under one attempt. Outputs of other
attempts are dropped, so an engine that was given up and comes back answers nobody.
"""

import itertools
from array import array
from collections.abc import Callable

from msgspec.structs import replace

from loraplex.engine.router.routed_request import RoutedRequest
from loraplex.engine.router.router_queue import PriorityQueue, RouterQueue
from loraplex.scheduler.frontend_protocol import (
    AdapterSource,
    AddRequest,
    SequenceOutput,
    StepOutputs,
)

RETRIED_CODES = frozenset({"queue_full"})
"""Errors of one engine after which another may serve the request."""

MAX_DEATHS = 4
"""Engines that may die with a request before it is held to be the cause, and fails."""


class RequestBook:
    """Holds the sequences; those that wait are in the order of a queue."""

    def __init__(self, queue: RouterQueue | None = None) -> None:
        """`queue` is empty; default: by priority, then by arrival."""
        self._requests: dict[int, RoutedRequest] = {}  # by the frontend's id
        self._attempts: dict[int, RoutedRequest] = {}
        self._queue: RouterQueue = PriorityQueue() if queue is None else queue
        self._orders = itertools.count()
        self._attempt_ids = itertools.count(1)
        self.num_waiting = 0
        self.num_moves = 0  # requests that were sent again
        self.num_recomputed_tokens = 0
        self._begun: list[RoutedRequest] = []  # whose first token has come
        self._refusing: set[str] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def add(
        self,
        message: AddRequest,
        now: float,
        source_of: Callable[[str], AdapterSource | None] = lambda name: None,
    ) -> RoutedRequest:
        """Takes in a request, which then waits. Raises ValueError if its id is in use.

        `source_of` returns the folder that an adapter's name means now, if it is known.
        """
        if message.request_id in self._requests:
            raise ValueError(f"request {message.request_id} is unfinished")
        mix = [replace(p, source=p.source or source_of(p.adapter)) for p in message.mix]
        source = None if mix else source_of(message.adapter)
        request = RoutedRequest(message, next(self._orders), now, source=source, mix=mix)
        self._requests[message.request_id] = request
        self._wait(request)
        return request

    def first_waiting(self) -> RoutedRequest | None:
        """Returns the request to place next."""
        while (request := self._queue.first()) is not None:
            if not request.engine_id and request.message.request_id in self._requests:
                return request
            self._queue.pop()
        return None

    def start(self, request: RoutedRequest, engine_id: str) -> AddRequest:
        """Gives the request that first_waiting() returned to an engine; returns the message for it.

        A request that is sent again names the folder that its adapter meant when it came: the name
        may mean another one by now.
        """
        self._queue.pop()
        self.num_waiting -= 1
        source, mix = request.message.adapter_source, request.message.mix
        if request.was_sent:
            source, mix = source or request.source, request.mix
        else:
            self._queue.on_sent(request)
        request.was_sent = True
        request.engine_id, request.attempt = engine_id, next(self._attempt_ids)
        request.num_to_skip = request.num_scored
        self._attempts[request.attempt] = request
        return replace(
            request.message,
            request_id=request.attempt,
            adapter_source=source,
            mix=mix,
            generated_token_ids=request.generated[:],
        )

    def on_outputs(self, outputs: StepOutputs) -> StepOutputs | None:
        """Takes in a step's outputs; returns them under the frontend's ids, None if none are left.

        Requests that their engine had no room for wait again.
        """
        request_ids, token_ids = array("q"), array("i")
        attempts = self._attempts
        for attempt, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            request = attempts.get(attempt)
            if request is not None:
                if not request.generated:
                    self._begun.append(request)
                request.generated.append(token_id)
                self._queue.on_tokens(request, 1)
                request_ids.append(request.message.request_id)
                token_ids.append(token_id)
        details = [kept for output in outputs.details if (kept := self._take(output)) is not None]
        if not request_ids and not details:
            return None
        return StepOutputs(request_ids, token_ids, details)

    def _take(self, output: SequenceOutput) -> SequenceOutput | None:
        request = self._attempts.get(output.request_id)
        if request is None:
            return None
        if output.error_code in RETRIED_CODES:
            self._refusing.add(request.engine_id)
            self._recall(request)
            return None
        if output.token_ids and not request.generated:
            self._begun.append(request)
        self._queue.on_tokens(request, len(output.token_ids))
        taken = request.take(output)
        if taken.finish_reason:
            self._forget(request)
        return taken

    def take_begun(self) -> list[RoutedRequest]:
        """Returns the requests whose first token has come since the last call."""
        begun, self._begun = self._begun, []
        return begun

    def take_refusing(self) -> set[str]:
        """Returns the engines that have had no room for a request since the last call."""
        refusing, self._refusing = self._refusing, set()
        return refusing

    def count_death(self, engine_id: str) -> list[RoutedRequest]:
        """Counts the death of an engine for its requests; returns those that reach MAX_DEATHS."""
        held = [request for request in self._attempts.values() if request.engine_id == engine_id]
        for request in held:
            request.num_deaths += 1
        return [request for request in held if request.num_deaths >= MAX_DEATHS]

    def end(self, request_id: int) -> tuple[str, int] | None:
        """Forgets a request; returns the engine and the attempt to abort, if it was sent."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        at = (request.engine_id, request.attempt) if request.engine_id else None
        self._forget(request)
        return at

    def recall(self, engine_id: str) -> "array[int]":
        """Lets all requests of an engine wait again; returns the attempts, which are over."""
        moved = [request for request in self._attempts.values() if request.engine_id == engine_id]
        attempts = array("q", [request.attempt for request in moved])
        for request in moved:
            self.num_moves += 1
            if request.generated:
                self.num_recomputed_tokens += request.num_tokens
            self._recall(request)
        return attempts

    def waiting_since(self, time: float) -> list[RoutedRequest]:
        """Returns the waiting requests that came at `time` or before."""
        return [r for r in self._requests.values() if not r.engine_id and r.arrived_at <= time]

    def _wait(self, request: RoutedRequest) -> None:
        self.num_waiting += 1
        self._queue.push(request)

    def _recall(self, request: RoutedRequest) -> None:
        del self._attempts[request.attempt]
        request.engine_id, request.attempt = "", 0
        self._wait(request)

    def _forget(self, request: RoutedRequest) -> None:
        del self._requests[request.message.request_id]
        if request.engine_id:
            del self._attempts[request.attempt]
        else:
            self.num_waiting -= 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless each request waits or is at one engine."""
        waiting = [r for r in self._requests.values() if not r.engine_id]
        placed = [r for r in self._requests.values() if r.engine_id]
        assert len(waiting) == self.num_waiting, "waiting requests are counted wrongly"
        assert {r.attempt: r for r in placed} == self._attempts, "attempts and requests differ"
        queued = {id(request) for request in self._queue}
        assert all(id(r) in queued for r in waiting), "a waiting request is in no queue"
