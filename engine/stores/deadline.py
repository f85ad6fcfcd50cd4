"""The time that a look-up has left."""

import threading
import time
from collections.abc import Callable


class StoreTimeoutError(OSError):
    """A look-up took longer than it may, or the process ends."""


class Deadline:
    """A point in time after which, or once `closed` is set, waiting ends with an error."""

    def __init__(
        self,
        seconds: float,
        closed: threading.Event | None = None,
        *,
        name: str = "adapter_store_timeout_s",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is what the error calls the limit."""
        self._name = name
        self._seconds = seconds
        self._clock = clock
        self._at = clock() + seconds
        self.closed = closed or threading.Event()

    @property
    def left_s(self) -> float:
        """Seconds that are left; 0 when the time is over."""
        return 0.0 if self.closed.is_set() else max(0.0, self._at - self._clock())

    @property
    def overdue_s(self) -> float:
        """Seconds since the time was over, negative before."""
        return self._clock() - self._at

    def check(self) -> None:
        """Raises StoreTimeoutError if no time is left."""
        if self.left_s <= 0:
            raise StoreTimeoutError(
                "the server ends"
                if self.closed.is_set()
                else f"it took longer than the {self._seconds:g} s of {self._name}"
            )

    def sleep(self, seconds: float) -> None:
        """Waits. Raises StoreTimeoutError at the deadline."""
        self.closed.wait(min(seconds, self.left_s))
        self.check()
