"""Tracks the clients of a frontend that wait for something, and keeps what they do not read yet.

A ROUTER socket reports that a peer has left only when something is sent to it. So the frontend
sends each waiting client a message at least every PROBE_INTERVAL_S: a "ping" if it has no output.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from loraplex.engine.frontend.byte_budget import ByteBudget
from loraplex.engine.frontend.protocol import error_reply
from loraplex.engine.ipc.channel import PeerGoneError, SlowPeerError

PROBE_INTERVAL_S = 2.0
MAX_UNREAD_BYTES = 64 << 20  # replies kept for one client
MAX_UNREAD_BYTES_IN_ALL = 256 << 20
FIRST_RETRY_S = 0.001  # a client that reads makes room at once; doubled at each failure
LAST_RETRY_S = 0.5

Send = Callable[[bytes, bytes], None]
Clock = Callable[[], float]


class Requests(Protocol):
    """The part of RequestTable that a client table uses."""

    def has_requests(self, client: bytes) -> bool: ...

    def drop_client(self, client: bytes) -> list[str]:
        """Ends every request of the client. Returns their ids."""


class Clients(Protocol):
    """The clients of one entrance. The frontend replies to them and ends what they leave behind."""

    num_lost: int
    num_slow: int

    def __len__(self) -> int:
        """Returns the number of clients that wait for something."""

    @property
    def num_unread_bytes(self) -> int:
        """Number of bytes kept for clients that do not read, all together."""

    @property
    def flush_due_s(self) -> float | None:
        """Seconds until flush() has something to try, None if no client has unread replies."""

    def watch(self, client: bytes) -> None:
        """Notes that the client waits for a request."""

    def reply(self, client: bytes, message: dict[str, Any]) -> None:
        """Takes a message for a client. Drops it if the client has left. Never raises."""

    def forget(self, client: bytes) -> None:
        """Removes a client and ends its requests."""

    def tick(self) -> None:
        """Does what is due about once a second."""

    def flush(self) -> None:
        """Sends clients what they had no room for."""


ClientsOf = Callable[[Requests], Clients]
"""Makes the clients of an entrance, which end their requests through the argument."""


@dataclass(slots=True)
class _Client:
    """`unread` holds encoded replies that the socket had no room for, in order."""

    last_sent: float = 0.0
    unread: deque[bytes] = field(default_factory=deque)
    retry_s: float = FIRST_RETRY_S
    next_retry: float = 0.0


class ClientTable:
    """Sends replies. Cancels the requests of a client that has left or does not read.

    Attributes:
        num_lost: clients that left while they had requests.
        num_slow: times that a client was cut off because it did not read.
    """

    def __init__(
        self,
        send: Send,
        requests: Requests,
        *,
        max_unread: int,
        budget: ByteBudget | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Makes a table without clients.

        Args:
            send: sends an encoded reply; raises PeerGoneError or SlowPeerError.
            max_unread: replies that are kept for a client which does not read.
            budget: bytes of such replies; MAX_UNREAD_BYTES for each client by default.
            clock: returns seconds.
        """
        self._send = send
        self._clock = clock
        self._requests = requests
        self._max_unread = max_unread
        self._clients: dict[bytes, _Client] = {}
        self._slow: dict[bytes, _Client] = {}  # those with unread replies
        self._budget = budget or ByteBudget(
            for_each=MAX_UNREAD_BYTES, in_all=MAX_UNREAD_BYTES_IN_ALL
        )
        self.num_lost = 0
        self.num_slow = 0

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def num_unread_bytes(self) -> int:
        """Number of bytes kept for clients that do not read, all together."""
        return self._budget.total

    def watch(self, client: bytes) -> None:
        """Probes the client from now until its last request has finished."""
        self._clients.setdefault(client, _Client(last_sent=self._clock()))

    def reply(self, client: bytes, message: dict[str, Any]) -> None:
        """Sends a message, or keeps it until the client reads. Drops it if the client has left.

        Never raises.
        """
        data: bytes = msgpack.packb(message)
        state = self._clients.get(client)
        if state is not None and state.unread:
            self._keep(client, state, data)
            return
        try:
            self._send(client, data)
        except SlowPeerError:
            self.watch(client)
            self._keep(client, self._clients[client], data)
            return
        except PeerGoneError:
            self._lose(client)
        state = self._clients.get(client)
        if state is not None:
            state.last_sent = self._clock()
            self._remove_if_done(client, state)

    def forget(self, client: bytes) -> None:
        """Removes a client and ends its requests."""
        self._requests.drop_client(client)
        state = self._clients.pop(client, None)
        if state is not None:
            self._clear_unread(client, state)

    def tick(self) -> None:
        """Probes the clients that were sent nothing lately. Call it about once a second."""
        due = self._clock() - PROBE_INTERVAL_S
        for client, state in list(self._clients.items()):
            if not state.unread and state.last_sent < due:
                self.reply(client, {"type": "ping"})

    @property
    def flush_due_s(self) -> float | None:
        """Seconds until flush() has something to try, None if no client has unread replies."""
        if not self._slow:
            return None
        return max(0.0, min(state.next_retry for state in self._slow.values()) - self._clock())

    def flush(self) -> None:
        """Sends clients what they had no room for. Tries seldom where nobody reads."""
        now = self._clock()
        for client, state in list(self._slow.items()):
            if state.next_retry <= now:
                self._deliver(client, state)

    def _deliver(self, client: bytes, state: _Client) -> None:
        num_sent = 0
        try:
            while state.unread:
                self._send(client, state.unread[0])
                self._budget.give_back(client, len(state.unread.popleft()))
                num_sent += 1
        except SlowPeerError:
            state.retry_s = FIRST_RETRY_S if num_sent else min(2 * state.retry_s, LAST_RETRY_S)
            state.next_retry = self._clock() + state.retry_s
            return
        except PeerGoneError:
            self._lose(client)
            return
        self._clear_unread(client, state)
        state.last_sent = self._clock()
        self._remove_if_done(client, state)

    def _keep(self, client: bytes, state: _Client, data: bytes) -> None:
        """Adds a reply to the unread ones. Cuts off whoever leaves too much unread."""
        if len(state.unread) < self._max_unread and self._push(client, state, data):
            return
        if len(state.unread) < self._max_unread and self._budget.has_share(client, len(data)):
            largest = self._budget.largest()  # the budget of all is spent
            self._cut_off(largest)
            if largest == client or self._push(client, state, data):
                return
        self._cut_off(client)

    def _push(self, client: bytes, state: _Client, data: bytes) -> bool:
        if not self._budget.take(client, len(data)):
            return False
        if not state.unread:
            state.retry_s = FIRST_RETRY_S
            state.next_retry = self._clock() + FIRST_RETRY_S
        state.unread.append(data)
        self._slow[client] = state
        return True

    def _clear_unread(self, client: bytes, state: _Client) -> None:
        self._budget.give_back(client, sum(map(len, state.unread)))
        state.unread.clear()
        self._slow.pop(client, None)

    def _cut_off(self, client: bytes) -> None:
        """Cancels the requests of a client, and keeps an error for each instead of its replies."""
        self.num_slow += 1
        state = self._clients[client]
        self._clear_unread(client, state)
        for request_id in self._requests.drop_client(client):
            error = error_reply(
                request_id,
                "slow_client",
                "the client left too many messages unread, so its requests were cancelled: "
                "read faster, send fewer requests, or raise max_client_backlog",
            )
            self._push(client, state, msgpack.packb(error))
        self._remove_if_done(client, state)

    def _remove_if_done(self, client: bytes, state: _Client) -> None:
        if not state.unread and not self._requests.has_requests(client):
            self._clients.pop(client, None)

    def _lose(self, client: bytes) -> None:
        if client in self._clients:
            self.num_lost += 1
            self.forget(client)
