"""Decides whether a frontend accepts requests."""

import math
import time
from collections.abc import Callable

from loraplex.engine.errors import client_error


class Gate:
    """Is open until close_in() has been called and its time is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._closes_at = math.inf

    @property
    def is_closing(self) -> bool:
        """Tells whether close_in() has been called. Load balancers must send nothing more."""
        return self._closes_at < math.inf

    @property
    def closes_in_s(self) -> float:
        """Seconds until requests are refused; 0 if they are."""
        return max(0.0, self._closes_at - self._clock())

    def close_in(self, grace_s: float) -> None:
        self._closes_at = self._clock() + grace_s

    def check(self) -> None:
        """Raises ClientError (code "draining") if requests are refused."""
        if self.is_closing and not self.closes_in_s:
            raise client_error(
                "draining", "the server is stopping and takes no new requests: ask another one"
            )
