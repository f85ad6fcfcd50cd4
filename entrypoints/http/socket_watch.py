"""Waits for ZeroMQ sockets on an event loop."""

import asyncio
from collections.abc import Callable
from typing import Any

import zmq


class SocketWatch:
    """Calls a function when sockets may have messages; takes sockets as zmq.Poller does.

    ZeroMQ signals a socket's descriptor once when messages arrive, and a send may take the signal.
    So ask `has_messages` after each turn.

    Attributes:
        on_ready: the function. Set it before messages can come.
    """

    def __init__(self) -> None:
        """Makes a watch of the running event loop."""
        self.on_ready: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._sockets: dict[Any, int] = {}  # socket -> its descriptor

    def register(self, socket: Any, flags: int = zmq.POLLIN) -> None:
        """Watches a socket. Unregister it before you close it."""
        self._sockets[socket] = socket.fileno()
        self._loop.add_reader(self._sockets[socket], self._on_readable)

    def unregister(self, socket: Any) -> None:
        self._loop.remove_reader(self._sockets.pop(socket))

    def _on_readable(self) -> None:
        self.on_ready()

    @property
    def has_messages(self) -> bool:
        """Tells whether a socket has a message to read."""
        return any(int(socket.get(zmq.EVENTS)) & zmq.POLLIN for socket in self._sockets)

    def close(self) -> None:
        """Watches no socket any more."""
        for socket in list(self._sockets):
            self.unregister(socket)
