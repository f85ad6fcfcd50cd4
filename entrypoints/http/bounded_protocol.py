"""Bounds the time and the bytes that the head of an HTTP request may take."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 30.0
MAX_HEAD_BYTES = 64 << 10
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections that send no whole head within `head_s`, or too large a one.

    uvicorn itself waits for a head without end, and keeps whatever comes of it.
    """

    head_s = HEAD_S

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes what uvicorn's protocol takes."""
        super().__init__(*args, **options)
        self._awaits_head = True  # not a body
        self._num_head_bytes = 0  # of a head that is not complete
        self._timer: asyncio.TimerHandle | None = None  # runs while a head is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Takes some bytes of a head or a body."""
        if self._awaits_head:
            self._await_head()
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self.transport.write(TOO_LARGE)
                self.transport.close()
                return
            self._num_head_bytes += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """Ends the wait."""
        self._stop_timer()
        self._awaits_head, self._num_head_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Awaits the next head."""
        self._awaits_head = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the wait."""
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
