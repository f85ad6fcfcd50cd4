"""Connects a client to a server: a DEALER socket, and a monitor that sees the loss of it."""

import os
import re
import time
import weakref
from collections.abc import Sequence
from typing import Any

import msgpack
import zmq
import zmq.auth
from zmq.utils.monitor import parse_monitor_message

from loraplex.engine.errors import (
    ConfigError,
    ConnectionLostError,
    EngineDeadError,
    client_error,
)
from loraplex.engine.ipc.channel import RECEIVE_LIMIT, open_socket
from loraplex.entrypoints.client.session import Message

CLIENT_HWM = 4096  # messages
SEND_TIMEOUT_MS = 10_000
LINGER_MS = 500  # for the last messages to leave
MAX_FAILED_HANDSHAKES = 5  # a server that is ending may break off the first one

_NO_SERVER = "no ZeroMQ address of a loraplex server (an HTTP port, for example)"
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class SocketTransport:
    """Sends messages to one endpoint and receives replies.

    Attributes:
        sockets: the sockets to poll before drain().
        is_local: the address is one of this machine.
        max_message_bytes: the server's limit, 0 until it is known.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        server_public_key: str | None = None,
        client_secret_key_file: str | None = None,
    ) -> None:
        """Connects in the background; see Client for the arguments.

        Raises:
            ConfigError: the endpoint or a key cannot be used.
        """
        if not re.match(r"tcp://.+:\d+$|ipc://.", endpoint):
            raise ConfigError(f"endpoint must be tcp://HOST:PORT or ipc://PATH, got {endpoint!r}")
        self.endpoint = endpoint
        self.is_local = bool(re.match(r"ipc://|tcp://(127\.|localhost:|\[::1\])", endpoint))
        self.max_message_bytes = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._connected = False
        self._num_failed_handshakes = 0
        self._lost = ""
        try:
            self._socket = open_socket(
                self._context,
                zmq.DEALER,
                hwm=CLIENT_HWM,
                linger_ms=LINGER_MS,
                heartbeat=True,
            )
            self._socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
            if server_public_key:
                self._set_up_curve(server_public_key, client_secret_key_file)
            elif client_secret_key_file:
                raise ConfigError(
                    "client_secret_key_file needs server_public_key: give both, or neither"
                )
            self._monitor = self._socket.get_monitor_socket(_EVENTS)
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot connect to {endpoint!r}: {error}") from None
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.sockets = (self._socket, self._monitor)
        # A context that the collector finds in a cycle with its sockets would wait for them for
        # ever. The finalizer keeps all of them out of such a cycle.
        self._finalizer = weakref.finalize(self, _close, self._context, self._socket, self._monitor)
        self._poller = zmq.Poller()
        for socket in self.sockets:
            self._poller.register(socket, zmq.POLLIN)

    def _set_up_curve(self, server_public_key: str, client_secret_key_file: str | None) -> None:
        if os.path.exists(server_public_key):
            server, _ = _certificate(server_public_key)
        else:
            server = server_public_key.encode()
        if len(server) != 40:
            raise ConfigError("server_public_key must be 40 Z85 characters or a certificate file")
        public, secret = zmq.curve_keypair()
        if client_secret_key_file:
            public, own = _certificate(client_secret_key_file)
            if own is None:
                raise ConfigError(
                    f"{client_secret_key_file} holds no secret key: name the file that ends in "
                    ".key_secret"
                )
            secret = own
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, server)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)

    def send(self, message: Message, frames: Sequence[memoryview] = ()) -> None:
        """Sends a message. Waits while CLIENT_HWM messages are on their way.

        `frames` are not copied: they must not change before the answer.

        Raises:
            ClientError: the message cannot be encoded, or is larger than the server accepts.
            EngineDeadError: the server has not read a message for SEND_TIMEOUT_MS.
        """
        try:
            self._socket.send_multipart([self.encode(message), *frames], copy=not frames)
        except zmq.Again:
            raise self.blocked() from None

    def try_send(self, data: bytes, frames: Sequence[memoryview] = ()) -> bool:
        """Sends an encoded message without waiting. Returns whether there was room for it."""
        try:
            self._socket.send_multipart([data, *frames], zmq.DONTWAIT, copy=not frames)
        except zmq.Again:
            return False
        return True

    def check_reached(self, waited_s: float) -> None:
        """Raises EngineDeadError if no server was found in this time, and nothing else is known."""
        if not self._lost and not self._connected:
            raise EngineDeadError(
                f"no server was reached at {self.endpoint} in {waited_s:g} s: start one with "
                "`loraplex serve`, or check the address"
            )

    def blocked(self) -> EngineDeadError:
        """Returns the error for a message that had no room for SEND_TIMEOUT_MS."""
        return EngineDeadError(f"{self.endpoint} has stopped reading messages")

    def encode(self, message: Message) -> bytes:
        """Returns the frame of a message. Raises ClientError as send() does."""
        try:
            data: bytes = msgpack.packb(message)
        except (TypeError, ValueError, OverflowError) as error:
            raise client_error("bad_request", f"the request cannot be sent: {error}") from None
        if self.max_message_bytes and len(data) > self.max_message_bytes:
            raise client_error(
                "too_large",
                f"the request has {len(data)} bytes, the server takes "
                f"{self.max_message_bytes}: send less, or raise max_message_bytes of the server",
            )
        return data

    def receive(self, timeout_s: float | None) -> list[Message]:
        """Waits for a reply and returns all that have come, [] after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            replies = self.drain()
            if replies or (deadline is not None and time.monotonic() >= deadline):
                return replies
            wait_s = None if deadline is None else deadline - time.monotonic()
            self._poller.poll(None if wait_s is None else max(1, int(wait_s * 1000)))

    def drain(self) -> list[Message]:
        """Returns the replies that have come, at most RECEIVE_LIMIT.

        Raises:
            ConnectionLostError: the connection is lost and every reply was returned.
        """
        self._read_monitor()
        replies: list[Message] = []
        while len(replies) < RECEIVE_LIMIT:
            try:
                data = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                break
            try:
                replies.append(msgpack.unpackb(data, strict_map_key=False))
            except Exception:  # msgpack raises exceptions of many classes for bad bytes
                self._lost = f"{self.endpoint} is {_NO_SERVER}"
                break
        if self._lost and not replies:
            raise ConnectionLostError(self._lost)
        return replies

    def is_lost(self) -> bool:
        self._read_monitor()
        return bool(self._lost)

    def _read_monitor(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.DONTWAIT))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
            elif event == zmq.EVENT_DISCONNECTED and not self._connected:
                continue  # the socket connects again by itself
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._may_try_again():
                continue
            elif event == zmq.EVENT_DISCONNECTED:
                self._lost = (
                    f"the connection to {self.endpoint} was lost: the frontend was restarted, the "
                    "engine has stopped, or it refused a message for its size. Unfinished requests "
                    "have failed; the next call connects again"
                )
            else:
                self._lost = (
                    f"{self.endpoint} refused the connection: "
                    "the CurveZMQ keys do not match, only one side uses keys, or it is "
                    f"{_NO_SERVER}"
                )

    def _may_try_again(self) -> bool:
        """Count a handshake that the server broke off. Wrong keys break off every one."""
        self._num_failed_handshakes += 1
        return self._num_failed_handshakes < MAX_FAILED_HANDSHAKES

    def close(self) -> None:
        """Says goodbye, if there is room for it, and disconnects. Calling again does nothing.

        Dropping the transport disconnects too.
        """
        if self._finalizer.alive and not self._lost:
            self.try_send(self.encode({"type": "bye"}))
        self._finalizer()


def _close(context: "zmq.Context[Any]", socket: "zmq.Socket[bytes]", monitor: Any) -> None:
    """Closes everything; `monitor` is an argument so that it lives as long as its socket."""
    socket.disable_monitor()
    context.destroy(linger=LINGER_MS)


def _certificate(path: str) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a CurveZMQ certificate: {error}") from None
