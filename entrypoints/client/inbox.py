"""Sorts the results that a client receives by who waits for them."""

from collections import deque

from loraplex.entrypoints.client.output_assembler import Message
from loraplex.entrypoints.client.outputs import RequestFailure, RequestResult


class Inbox:
    """Keeps results until generate(), poll() or a command takes them."""

    def __init__(self) -> None:
        self.submitted: set[str] = set()
        """Ids of submitted requests whose end take_submitted() has not returned."""
        self._iterated: dict[str, deque[RequestResult]] = {}
        self._results: deque[RequestResult] = deque()
        self._answers: dict[str, Message | RequestFailure] = {}

    def open_queue(self, request_id: str) -> deque[RequestResult]:
        """Returns the queue that the results of one request go to until close_queue()."""
        queue: deque[RequestResult] = deque()
        self._iterated[request_id] = queue
        return queue

    def close_queue(self, request_id: str) -> None:
        del self._iterated[request_id]

    @property
    def has_submitted_results(self) -> bool:
        return bool(self._results)

    def take_submitted(self) -> list[RequestResult]:
        """Returns the results of submitted requests that have come, in order."""
        results = list(self._results)
        self._results.clear()
        for result in results:
            if isinstance(result, RequestFailure) or result.finished:
                self.submitted.discard(result.request_id)
        return results

    def take_answer(self, request_id: str) -> Message | RequestFailure | None:
        """Returns the answer to a command, None while there is none."""
        return self._answers.pop(request_id, None)

    def put(self, request_id: str, result: RequestResult | Message) -> None:
        if isinstance(result, dict):
            self._answers[request_id] = result
        elif request_id in self._iterated:
            self._iterated[request_id].append(result)
        elif request_id in self.submitted:
            self._results.append(result)
        elif isinstance(result, RequestFailure):
            self._answers[request_id] = result
