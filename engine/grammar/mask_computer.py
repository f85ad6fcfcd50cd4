"""Computes the masks of many sequences at once, by the grammar library's own threads."""

import ctypes
import logging
import os
import threading
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass

from llguidance import LLExecutor

from loraplex.engine.grammar.matcher import GrammarMatcher, allows

MAX_THREADS = 8

logger = logging.getLogger("loraplex.scheduler")


@dataclass(frozen=True, slots=True)
class MaskTask:
    """Tokens that a sequence has taken, after which its next mask is wanted.

    The masks after each of its drafts are wanted too, up to one that the grammar forbids.
    """

    matcher: GrammarMatcher
    token_ids: Collection[int]
    drafts: Collection[int] = ()
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
        """Set the masks of a batch: one round for the next tokens, then one for each draft."""
        tasks = [task for task in batch if task.matcher.consume(task.token_ids)]
        following = [_Following(task) for task in tasks]
        active = following
        while active:
            made = self._make_masks([one.matcher for one in active])
            active = [
                one for one, mask in zip(active, made, strict=True) if one.goes_on_after(mask)
            ]
        for one in following:
            one.task.matcher.set_masks(one.masks)

    def _make_masks(self, matchers: list[GrammarMatcher]) -> "list[array[int] | None]":
        """Returns the masks in the order of the matchers; those of a vocabulary in one call."""
        made: dict[GrammarMatcher, array[int] | None] = {}
        for vocabulary in {id(m.vocabulary): m.vocabulary for m in matchers}.values():
            some = [matcher for matcher in matchers if matcher.vocabulary is vocabulary]
            made |= zip(some, self._make_some(some), strict=True)
        return [made[matcher] for matcher in matchers]

    def _make_some(self, matchers: list[GrammarMatcher]) -> "list[array[int] | None]":
        """Returns the masks of matchers with one vocabulary."""
        size = matchers[0].vocabulary.num_library_bytes
        if len(self._buffer) < size * len(matchers):
            self._buffer = bytearray(size * len(matchers))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        jobs = [(matcher.library, place) for place, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(jobs, address, size, len(jobs))
        view = memoryview(self._buffer)
        return [
            matcher.make_mask(view[place * size : (place + 1) * size])
            for place, matcher in enumerate(matchers)
        ]


class _Following:
    """One task on its way along the drafts. A copy of the matcher follows them."""

    def __init__(self, task: MaskTask) -> None:
        self.task = task
        self.matcher = task.matcher
        self.masks: list[array[int]] = []
        self._drafts = iter(task.drafts)

    def goes_on_after(self, mask: "array[int] | None") -> bool:
        """Keep the mask and take the next draft. Returns whether there is one that it allows."""
        if mask is None:
            return False
        self.masks.append(mask)
        draft = next(self._drafts, None)
        if draft is None or not allows(mask, draft):
            return False
        if self.matcher is self.task.matcher:
            self.matcher = self.matcher.branch()
        return self.matcher.consume((draft,))
