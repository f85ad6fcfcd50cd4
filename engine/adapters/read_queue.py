"""Runs the reads of a worker's adapters, and repeats those that fail for a passing reason."""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from loraplex.engine.errors import AdapterError

logger = logging.getLogger("loraplex")

RETRY_DELAYS_S = (0.1, 0.5, 2.0)
"""Seconds before each repetition of a read. After the last one the read has failed."""

Fail = Callable[[Exception, bool], None]
"""Takes the error of a read, and whether it is transient: reading it later may work."""


class ReadQueue:
    """Runs reads in `num_threads` threads. A read that waits for its repetition holds no thread."""

    def __init__(self, num_threads: int, enter_thread: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "adapter-reader", initializer=enter_thread)
        self._timers: set[threading.Timer] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, read: Callable[[], None], fail: Fail) -> None:
        """Run `read` soon. If it fails for good, or too often, `fail` is called instead."""
        self._pool.submit(self._run, read, fail, 0)

    def close(self) -> None:
        """Wait for the reads under way. Reads that have not begun are dropped."""
        with self._lock:
            self._is_closed = True
            timers = list(self._timers)
        for timer in timers:
            timer.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, read: Callable[[], None], fail: Fail, num_failures: int) -> None:
        try:
            read()
        except AdapterError as error:
            fail(error, False)
        except Exception as error:
            if self._is_closed:
                return  # what the read needs is closed too
            if num_failures == len(RETRY_DELAYS_S):
                fail(error, True)
                return
            delay_s = RETRY_DELAYS_S[num_failures]
            logger.warning("reading an adapter failed, and is tried again: %s", error)
            self._run_later(delay_s, read, fail, num_failures + 1)

    def _run_later(
        self, delay_s: float, read: Callable[[], None], fail: Fail, num_failures: int
    ) -> None:
        def run() -> None:
            with self._lock:
                self._timers.discard(timer)
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._pool.submit(self._run, read, fail, num_failures)

        timer = threading.Timer(delay_s, run)
        timer.daemon = True
        with self._lock:
            if not self._is_closed:
                self._timers.add(timer)
                timer.start()
