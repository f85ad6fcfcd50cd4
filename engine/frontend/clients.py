"""The clients of a frontend that have something unfinished, and whether they still listen.

A ROUTER socket tells that a peer has left only when something is sent to it. So a client that
waits hears from us at least every PROBE_INTERVAL_S: a "ping" where there is no output.
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


class Requests(Protocol):
    """What the table asks of the requests."""

    def has_requests(self, client: bytes) -> bool: ...

    def drop_client(self, client: bytes) -> list[str]:
        """End what the client has running; returns the ids."""


@dataclass(slots=True)
class _Client:
    last_sent: float = 0.0
    undelivered: deque[dict[str, Any]] = field(
        default_factory=lambda: deque(maxlen=MAX_UNDELIVERED)
    )


class ClientTable:
    """Sends replies; a client found to be gone or not reading loses its requests."""

    def __init__(self, send: Send, requests: Requests) -> None:
        """`send` raises PeerGoneError or SlowPeerError."""
        self._send = send
        self._requests = requests
        self._clients: dict[bytes, _Client] = {}
        self.num_lost = 0
        self.num_slow = 0

    def __len__(self) -> int:
        return len(self._clients)

    def watch(self, client: bytes) -> None:
        """The client is about to have something unfinished."""
        self._clients.setdefault(client, _Client(last_sent=time.monotonic()))

    def reply(self, client: bytes, message: dict[str, Any]) -> None:
        """Never raises: what a client cannot be told, it is not told."""
        try:
            self._send(client, message)
        except SlowPeerError:
            self._cut_off(client)
        except PeerGoneError:
            self._lose(client)
        state = self._clients.get(client)
        if state is not None:
            state.last_sent = time.monotonic()
            self._release_if_idle(client, state)

    def forget(self, client: bytes) -> None:
        """The client has said that it leaves."""
        self._requests.drop_client(client)
        self._clients.pop(client, None)

    def tick(self) -> None:
        """Probe those who have heard nothing for a while; to be called about once a second."""
        due = time.monotonic() - PROBE_INTERVAL_S
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
        self._release_if_idle(client, state)

    def _release_if_idle(self, client: bytes, state: _Client) -> None:
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
                    "the client left too many messages unread; its requests were cancelled",
                )
                for request_id in dropped
            )

    def _lose(self, client: bytes) -> None:
        if client in self._clients:
            self.num_lost += 1
            self.forget(client)
