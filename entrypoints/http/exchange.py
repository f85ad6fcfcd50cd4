"""Carries the frontend's replies to the HTTP requests that wait for them."""

import asyncio
import itertools
import logging
from typing import Any, Protocol

from loraplex.engine.frontend.byte_budget import ByteBudget
from loraplex.engine.frontend.clients import Requests
from loraplex.entrypoints.http.errors import HttpError, http_error, unknown_model
from loraplex.entrypoints.http.requests.request_ids import index_of

MAX_UNREAD_BYTES = 4 << 20  # kept for one HTTP request whose client reads slowly
MAX_UNREAD_BYTES_IN_ALL = 256 << 20

logger = logging.getLogger("loraplex.http")


class Answer(Protocol):
    """Turns the replies to the prompts of one HTTP request into the body of its answer.

    Attributes:
        model: the name by which the request called its model.
        request_id: the id of the HTTP request.
        streams: True if the body is a stream of events.
    """

    model: str
    request_id: str
    streams: bool

    def add(self, index: int, reply: dict[str, Any]) -> bytes:
        """Takes an "output" message for the prompt `index`. Returns what can be sent now."""

    def end(self) -> bytes:
        """Returns the rest of the body. All prompts have finished."""


class Waiter(Protocol):
    """Takes the replies to one client of the frontend."""

    def put(self, reply: dict[str, Any]) -> None: ...


class ExchangeTable:
    """The clients of an HTTP frontend: each HTTP request is one client.

    Implements engine/frontend/clients.py's Clients. It is for one thread, that of the event loop.

    Attributes:
        num_lost: HTTP requests whose client left before the end.
        num_slow: HTTP requests that were cut off because their client read too slowly.
    """

    def __init__(self, requests: Requests, budget: ByteBudget | None = None) -> None:
        self.num_lost = 0
        self.num_slow = 0
        self.flush_due_s: float | None = None
        self._requests = requests
        self._budget = budget or ByteBudget(
            for_each=MAX_UNREAD_BYTES, in_all=MAX_UNREAD_BYTES_IN_ALL
        )
        self._waiters: dict[bytes, Waiter] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def num_unread_bytes(self) -> int:
        return self._budget.total

    def add(self, waiter: Waiter) -> bytes:
        """Returns the name under which the frontend knows the new client."""
        client = str(next(self._numbers)).encode()
        self._waiters[client] = waiter
        return client

    def reply(self, client: bytes, message: dict[str, Any]) -> None:
        waiter = self._waiters.get(client)
        if waiter is None:
            return
        try:
            waiter.put(message)
        except Exception:
            logger.exception("an answer failed")
            waiter.put({"type": "error", "code": "internal", "message": "internal error"})

    def forget(self, client: bytes) -> None:
        if self._waiters.pop(client, None) is not None:
            self._requests.drop_client(client)

    def end_requests(self, client: bytes) -> None:
        """Cancels what the client still waits for."""
        self._requests.drop_client(client)

    def keep(self, client: bytes, num_bytes: int) -> bool:
        """Counts bytes that the client has not taken. Cuts off whoever leaves too many.

        Returns False if that is this client.
        """
        if self._budget.take(client, num_bytes):
            return True
        if self._budget.has_share(client, num_bytes):
            self._cut_off(self._budget.largest())  # the budget of all is spent
            if self._budget.take(client, num_bytes):
                return True
        self._cut_off(client)
        return False

    def give_back(self, client: bytes, num_bytes: int) -> None:
        self._budget.give_back(client, num_bytes)

    def _cut_off(self, client: bytes) -> None:
        self.num_slow += 1
        self._waiters[client].put(
            {
                "type": "error",
                "code": "slow_client",
                "message": "the client left too much of the stream unread, so its request was "
                "cancelled: read faster",
            }
        )

    def watch(self, client: bytes) -> None:
        """Does nothing: a client that leaves closes its connection."""

    def tick(self) -> None:
        """Does nothing: nobody needs to be probed."""

    def flush(self) -> None:
        """Does nothing: each HTTP request takes its bytes when its connection has room."""


class Query:
    """Waits for the reply to one command. Await `reply`."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def put(self, reply: dict[str, Any]) -> None:
        if self.reply.done():
            return
        if reply["type"] == "error":
            self.reply.set_exception(error_of(reply))
        else:
            self.reply.set_result(reply)


def error_of(reply: dict[str, Any]) -> HttpError:
    """Returns the HTTP error for an "error" message of the frontend."""
    retry_after_s = reply.get("retry_after_s", 0.0)
    return http_error(reply["code"], reply["message"], retry_after_s=retry_after_s)


class Exchange:
    """One HTTP request under way: bytes of its answer that the connection has not taken yet.

    Attributes:
        failure: the error that ended the answer, None if there is none.
    """

    def __init__(
        self, table: ExchangeTable, answer: Answer, num_prompts: int, *, is_mix: bool = False
    ) -> None:
        """`is_mix`: the request names several adapters, by other names than its model's."""
        self.failure: HttpError | None = None
        self.streams = answer.streams
        self.request_id = answer.request_id
        self.client = table.add(self)
        self._table = table
        self._answer = answer
        self._is_mix = is_mix
        self._num_prompts = self._num_unfinished = num_prompts
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._ended = False
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Tells whether nothing follows but what read() returns next."""
        return self._ended

    def put(self, reply: dict[str, Any]) -> None:
        """Takes a reply of the frontend."""
        if self._ended:
            return
        if reply["type"] == "error":
            unknown = reply["code"] == "unknown_adapter" and not self._is_mix
            error = error_of(reply)
            self._fail(unknown_model(self._answer.model) if unknown else error)
            return
        index = index_of(reply["request_id"], self._num_prompts)
        self._push(self._answer.add(index, reply))
        if reply["finished"] and not self._ended:
            self._num_unfinished -= 1
            if not self._num_unfinished:
                self._push(self._answer.end())
                self._ended = True
                self._changed.set()

    async def read(self) -> bytes:
        """Waits for more of the answer, and returns it. Returns b"" at the end.

        Raises:
            HttpError: the answer has failed.
        """
        while not (self._chunks or self._ended):
            self._changed.clear()
            await self._changed.wait()
        if self.failure is not None:
            raise self.failure
        return self._take()

    def close(self) -> None:
        """Ends the exchange, and cancels what the frontend still does for it."""
        if not self._ended:
            self._table.num_lost += 1
        self._ended = True
        self._take()
        self._table.forget(self.client)
        self._changed.set()

    def _push(self, data: bytes) -> None:
        if data and self._table.keep(self.client, len(data)):
            self._chunks.append(data)
            self._num_bytes += len(data)
            self._changed.set()

    def _take(self) -> bytes:
        self._table.give_back(self.client, self._num_bytes)
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._num_bytes = 0
        return data

    def _fail(self, error: HttpError) -> None:
        self.failure = error
        self._ended = True
        self._take()
        self._table.end_requests(self.client)
        self._changed.set()
