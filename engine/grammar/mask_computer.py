"""Computes the masks of many sequences at once, by the grammar library's own threads."""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from llguidance import LLExecutor

from loraplex.engine.grammar.matcher import GrammarMatcher

MAX_THREADS = 8

logger = logging.getLogger("loraplex.scheduler")


@dataclass(frozen=True, slots=True)
class MaskTask:
    """Tokens that a sequence has taken, after which its next mask is wanted."""

    matcher: GrammarMatcher
    token_ids: Collection[int]
    done: Callable[[], None] | None = None  # called in the computer's thread


class MaskComputer:
    """Takes what waits as one batch. Python's threads would wait for the interpreter at each mask.

    The first masks of new requests may take 10 ms each. They wait until no running request needs
    one, and come in batches of as many as there are threads.
    """

    def __init__(self, wakeup: Callable[[], None]) -> None:
        """`wakeup` is called after each batch, in the computer's thread."""
        self._wakeup = wakeup
        self._num_threads = min(MAX_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._executor = LLExecutor(num_threads=self._num_threads)
        self._buffer = bytearray()  # masks of a batch, as the library writes them
        self._changed = threading.Condition()  # of the next four
        self._next: list[MaskTask] = []
        self._first: list[MaskTask] = []
        self._num_next = 0  # unfinished ones of running requests
        self._is_closed = False
        threading.Thread(target=self._run, name="masks", daemon=True).start()

    def add_next(self, task: MaskTask) -> None:
        """Compute the mask of a running request."""
        with self._changed:
            self._next.append(task)
            self._num_next += 1
            self._changed.notify_all()

    def add_first(self, task: MaskTask) -> None:
        """Compute the mask of a request that has not started."""
        with self._changed:
            self._first.append(task)
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Wait until no running request lacks its mask, or the time is over."""
        if self._num_next:
            with self._changed:
                self._changed.wait_for(lambda: not self._num_next, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next or self._first or self._is_closed)
                if self._is_closed:
                    return
                batch, self._next = self._next, []
                num_next = len(batch)
                if not batch:
                    batch = self._first[: self._num_threads]
                    del self._first[: self._num_threads]
            try:
                self._compute(batch)
            except Exception as error:
                logger.exception("masks could not be computed")
                for task in batch:
                    task.matcher.on_error(f"the mask cannot be computed: {error}")
            for task in batch:
                if task.done is not None:
                    task.done()
            with self._changed:
                self._num_next -= num_next
                self._changed.notify_all()
            self._wakeup()

    def _compute(self, batch: list[MaskTask]) -> None:
        matchers = [task.matcher for task in batch if task.matcher.consume(task.token_ids)]
        if not matchers:
            return
        size = matchers[0].vocabulary.num_library_bytes
        if len(self._buffer) < size * len(matchers):
            self._buffer = bytearray(size * len(matchers))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        jobs = [(matcher.library, place) for place, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(jobs, address, size, len(jobs))
        view = memoryview(self._buffer)
        for place, matcher in enumerate(matchers):
            matcher.set_mask(view[place * size : (place + 1) * size])
