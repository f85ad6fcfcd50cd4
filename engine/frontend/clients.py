"""Tracks the clients of a frontend that wait for something.

A ROUTER socket reports that a peer has left only when something is sent to it. So the frontend
sends each waiting client a message at least every PROBE_INTERVAL_S: a "ping" if it has no output.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loraplex.engine.frontend.protocol import error_reply
from loraplex.engine.ipc.channel import PeerGoneError, SlowPeerError

PROBE_INTERVAL_S = 2.0
MAX_UNDELIVERED = 4096  # errors kept for a client that does not read

Send = Callable[[bytes, dict[str, Any]], None]
Clock = Callable[[], float]


class Requests(Protocol):
    """The part of RequestTable that ClientTable uses."""

    def has_requests(self, client: bytes) -> bool: ...

    def drop_client(self, client: bytes) -> list[str]:
        """Ends every request of the client. Returns their ids."""


@dataclass(slots=True)
class _Client:
    last_sent: float = 0.0
    undelivered: deque[dict[str, Any]] = field(
        default_factory=lambda: deque(maxlen=MAX_UNDELIVERED)
    )


class ClientTable:
    """Sends replies. Cancels the requests of a client that has left or does not read.

    Attributes:
        num_lost: clients that left while they had requests.
        num_slow: times that a client was cut off because it did not read.
    """

    def __init__(self, send: Send, requests: Requests, *, clock: Clock = time.monotonic) -> None:
        """`send` raises PeerGoneError or SlowPeerError; `clock` returns seconds."""
        self._send = send
        self._clock = clock
        self._requests = requests
        self._clients: dict[bytes, _Client] = {}
        self.num_lost = 0
        self.num_slow = 0

    def __len__(self) -> int:
        return len(self._clients)

    def watch(self, client: bytes) -> None:
        """Probes the client from now until its last request has finished."""
        self._clients.setdefault(client, _Client(last_sent=self._clock()))

    def reply(self, client: bytes, message: dict[str, Any]) -> None:
        """Sends a message. Drops it if the client has left or does not read; never raises."""
        try:
            self._send(client, message)
        except SlowPeerError:
            self._cut_off(client)
        except PeerGoneError:
            self._lose(client)
        state = self._clients.get(client)
        if state is not None:
            state.last_sent = self._clock()
            self._remove_if_done(client, state)

    def forget(self, client: bytes) -> None:
        """Removes a client and ends its requests."""
        self._requests.drop_client(client)
        self._clients.pop(client, None)

    def tick(self) -> None:
        """Probes the clients that were sent nothing lately. Call it about once a second."""
        due = self._clock() - PROBE_INTERVAL_S
        for client, state in list(self._clients.items()):
            if state.undelivered:
                self._deliver(client, state)
            elif state.last_sent < due:
                self.reply(client, {"type": "ping"})

    def _deliver(self, client: bytes, state: _Client) -> None:
        try:
            while state.undelivered:
                self._send(client, state.undelivered[0])
                state.undelivered.popleft()
        except SlowPeerError:
            return
        except PeerGoneError:
            self._lose(client)
            return
        self._remove_if_done(client, state)

    def _remove_if_done(self, client: bytes, state: _Client) -> None:
        if not state.undelivered and not self._requests.has_requests(client):
            self._clients.pop(client, None)

    def _cut_off(self, client: bytes) -> None:
        self.num_slow += 1
        dropped = self._requests.drop_client(client)
        if dropped:
            self.watch(client)
            self._clients[client].undelivered.extend(
                error_reply(
                    request_id,
                    "slow_client",
                    "the client left too many messages unread, so its requests were cancelled: "
                    "read faster, send fewer requests, or raise max_client_backlog",
                )
                for request_id in dropped
            )

    def _lose(self, client: bytes) -> None:
        if client in self._clients:
            self.num_lost += 1
            self.forget(client)
