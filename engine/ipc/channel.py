"""Sockets between the engine's processes, all made by one factory, and their in-process twin.

A channel carries messages. The side that binds is a ROUTER: it knows each peer by the name under
which that connected. The side that connects is a DEALER: its only peer is b"".
"""

import ctypes
import os
import signal
from collections import deque
from typing import Any, Protocol

import zmq

from loraplex.engine.errors import LoraplexError
from loraplex.engine.ipc import codec

INTERNAL_HWM = 1 << 16  # unread messages; the limits of the queues keep far below it
HEARTBEAT_MS = 2000  # a peer silent for three of these is disconnected
RECEIVE_LIMIT = 1024  # messages that receive() returns at most, unless told otherwise


def worker_identity(rank: int) -> bytes:
    """Returns the name of a worker as a peer of the scheduler."""
    return f"worker-{rank}".encode()


def frontend_identity(index: int, incarnation: int = 0) -> bytes:
    """Returns the name of a frontend as a peer of the scheduler; another one after each restart."""
    return f"frontend-{index}{f'.{incarnation}' if incarnation else ''}".encode()


class PeerGoneError(LoraplexError):
    """The peer has left."""

    code = "peer_gone"


class SlowPeerError(PeerGoneError):
    """The peer is connected, but its queue of unread messages is full."""


def open_socket(
    context: "zmq.Context[Any]",
    kind: int,
    *,
    hwm: int,
    receive_hwm: int | None = None,
    identity: bytes = b"",
    max_message_bytes: int = -1,
    linger_ms: int = 0,
    heartbeat: bool = False,
) -> "zmq.Socket[bytes]":
    """Returns a ROUTER or DEALER with every limit set; the caller binds or connects it.

    `heartbeat` is for clients: the server then notices one that stops or vanishes silently, and the
    client a server that does. Between the engine's own processes it would disconnect one that is
    stopped in a debugger. The server's socket must not use it; see ClientSocket.
    """
    if kind == zmq.ROUTER:
        seed_peer_numbers()
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, hwm)
    socket.setsockopt(zmq.RCVHWM, hwm if receive_hwm is None else receive_hwm)
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if heartbeat:
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TTL, 3 * HEARTBEAT_MS)
    if identity:
        socket.setsockopt(zmq.IDENTITY, identity)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return socket


def seed_peer_numbers() -> None:
    """Makes the numbers that the next ROUTER gives its peers unpredictable.

    libzmq numbers peers without an identity from libc's rand(), which it never seeds. It aborts
    the process when a peer has claimed a number that comes up later, so no client may guess one.
    """
    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4), "little")))


class Channel(Protocol):
    """One end of an edge between processes."""

    def send(self, message: object, peer: bytes = b"") -> None:
        """Never waits. Raises PeerGoneError, and SlowPeerError for a peer that does not read."""

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[tuple[bytes, Any]]:
        """Returns up to `limit` messages that have arrived, as (peer, message); never waits.

        The messages of one peer are in order. Peers take turns, so none can hold up another. What
        is not returned stays for the next call.
        """


class RouterChannel:
    """The binding end: one socket, many named peers."""

    def __init__(self, context: "zmq.Context[Any]", endpoint: str) -> None:
        self.socket = open_socket(context, zmq.ROUTER, hwm=INTERNAL_HWM)
        self.socket.bind(endpoint)

    def bind_port(self, host: str) -> str:
        """Listens on a free TCP port of an address of this machine too; returns the endpoint."""
        host = f"[{host}]" if ":" in host else host
        return f"tcp://{host}:{self.socket.bind_to_random_port(f'tcp://{host}')}"

    def send(self, message: object, peer: bytes = b"") -> None:
        self.send_encoded(codec.encode(message), peer)

    def send_encoded(self, data: bytes, peer: bytes) -> None:
        """Send a message that is encoded already, as one of several that are equal."""
        try:
            self.socket.send_multipart((peer, data), zmq.DONTWAIT)
        except zmq.Again:
            raise SlowPeerError(f"{_name(peer)} does not read its messages") from None
        except zmq.ZMQError as error:
            raise PeerGoneError(f"{_name(peer)}: {error}") from None

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[tuple[bytes, Any]]:
        messages: list[tuple[bytes, Any]] = []
        while len(messages) < limit:
            try:
                peer, data = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            messages.append((peer, codec.decode(data)))
        return messages

    def close(self) -> None:
        self.socket.close()


class DealerChannel:
    """The connecting end: one peer, reached under `identity`."""

    def __init__(
        self,
        context: "zmq.Context[Any]",
        endpoint: str,
        identity: bytes,
        *,
        reconnects: bool = True,
    ) -> None:
        """Without `reconnects` the peer stays silent once the connection is cut.

        Messages under way are lost in a cut, and those after it would hide that.
        """
        self.socket = open_socket(context, zmq.DEALER, hwm=INTERNAL_HWM, identity=identity)
        if not reconnects:
            self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self.socket.connect(endpoint)

    def send(self, message: object, peer: bytes = b"") -> None:
        try:
            self.socket.send(codec.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            raise SlowPeerError("the other side does not read its messages") from None

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[tuple[bytes, Any]]:
        messages: list[tuple[bytes, Any]] = []
        while len(messages) < limit:
            try:
                messages.append((b"", codec.decode(self.socket.recv(zmq.DONTWAIT))))
            except zmq.Again:
                break
        return messages

    def close(self) -> None:
        self.socket.close()


def _name(peer: bytes) -> str:
    return peer.decode(errors="replace")


class InprocChannel:
    """The twin for one thread: two queues, the same rules, every message encoded and decoded."""

    def __init__(self, identity: bytes) -> None:
        self._identity = identity
        self._inbox: deque[tuple[bytes, bytes]] = deque()
        self._other: InprocChannel | None = None

    @classmethod
    def pair(cls, identity: bytes) -> "tuple[InprocChannel, InprocChannel]":
        """Returns the binding end and the connecting end, which the first knows as `identity`."""
        router, dealer = cls(b""), cls(identity)
        router._other, dealer._other = dealer, router
        return router, dealer

    def send(self, message: object, peer: bytes = b"") -> None:
        self.send_encoded(codec.encode(message), peer)

    def send_encoded(self, data: bytes, peer: bytes) -> None:
        if self._other is None or peer != self._other._identity:
            raise PeerGoneError(f"no peer {peer!r}")
        self._other._inbox.append((self._identity, data))

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[tuple[bytes, Any]]:
        taken = [self._inbox.popleft() for _ in range(min(limit, len(self._inbox)))]
        return [(peer, codec.decode(data)) for peer, data in taken]

    def close(self) -> None:
        """The other end gets PeerGoneError from now on."""
        if self._other is not None:
            self._other._other = None
            self._other = None


class Wakeup:
    """Wakes a poller. set() may be called from any thread or signal handler."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        return self._reader

    def set_on_signals(self) -> None:
        """Let every signal wake the poller.

        The kernel may deliver a signal to any thread, but its Python handler runs in the main
        thread, which would go on sleeping in the poller.
        """
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def set(self) -> None:
        try:
            os.write(self._writer, b"x")
        except (BlockingIOError, OSError):
            return  # full: the reader wakes anyway; closed: no reader is left

    def clear(self) -> None:
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
