"""Counts the signals that ask a server to stop."""

import contextlib
import os
import select
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Takes SIGINT and SIGTERM from its start to close(), which restores the former handlers.

    For the main thread. It is a context manager.

    Attributes:
        count: signals that have come.
    """

    def __init__(self, on_signal: Callable[[int], None] = lambda count: None) -> None:
        """`on_signal` gets the count, inside the signal handler: it must take no lock."""
        self.count = 0
        self._on_signal = on_signal
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._former: dict[int, Any] = {
            number: signal.signal(number, self._handle) for number in NUMBERS
        }

    def wait(self, timeout_s: float) -> None:
        """Wait for the next signal, or for `timeout_s`."""
        if select.select([self._reader], [], [], timeout_s)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reader, 1)

    def close(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"x")
        self._on_signal(self.count)
