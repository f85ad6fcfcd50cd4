"""Reads something again on SIGHUP."""

import logging
import signal
from collections.abc import Callable
from types import FrameType

from loraplex.engine.errors import ConfigError

logger = logging.getLogger("loraplex")


class HangupReload:
    """Remembers SIGHUP until run_pending(): a signal handler must not wait for locks or files.

    Use it from the main thread. close() restores the former handler.
    """

    def __init__(self, reload: Callable[[], None] | None) -> None:
        """`reload` raises ConfigError if all stays as it was; None: SIGHUP is left alone."""
        self._reload = reload
        self._is_pending = False
        if reload is not None:
            self._former = signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_pending = True

    def run_pending(self) -> None:
        """Calls `reload` if the signal came, and logs what is wrong. Call it now and then."""
        if self._reload is None or not self._is_pending:
            return
        self._is_pending = False
        try:
            self._reload()
        except ConfigError as error:
            logger.error("SIGHUP: the former keys and tenants stay: %s", error)
        else:
            logger.info("SIGHUP: the keys and tenants were read again")

    def close(self) -> None:
        """Leaves SIGHUP to the former handler."""
        if self._reload is not None:
            signal.signal(signal.SIGHUP, self._former)
