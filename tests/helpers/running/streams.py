"""Streams for adapter loads in tests: simulated ones on a CPU, the current stream on a GPU."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loraplex.memory.device.page_copier import AfterPages
from loraplex.memory.device.pool import PagePool

TIMEOUT_S = 120.0  # only a test that hangs gets there, on a busy machine too


class SimulatedEvent:
    def __init__(self) -> None:
        self.reached = threading.Event()

    def synchronize(self) -> None:
        assert self.reached.wait(TIMEOUT_S)


class SimulatedStreams:
    """A PageCopier whose copies and steps run when `advance` is called.

    An entry of a stream is an event to wait for, or a function.
    """

    def __init__(self, pool: PagePool, seed: int) -> None:
        self._pool = pool
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._compute: deque[SimulatedEvent | Callable[[], Any]] = deque()
        self._scatter: deque[SimulatedEvent | Callable[[], Any]] = deque()

    def launch(self, function: Callable[[], Any]) -> None:
        with self._lock:
            self._compute.append(function)

    def record_event(self) -> SimulatedEvent:
        event = SimulatedEvent()
        self.launch(event.reached.set)
        return event

    def copy(
        self,
        packed: torch.Tensor,
        page_ids: Sequence[int],
        *,
        wait_for: SimulatedEvent,
        then: AfterPages,
    ) -> SimulatedEvent:
        ids, done = torch.tensor(page_ids), SimulatedEvent()
        per_layer = packed.view(len(self._pool.pages), len(page_ids), -1)
        writes = [
            lambda layer=layer, source=source: layer.index_copy_(0, ids, source)
            for layer, source in zip(self._pool.pages, per_layer, strict=True)
        ]
        with self._lock:
            self._scatter += [wait_for, *writes, lambda: then(ids), done.reached.set]
        return done

    def advance(self, num_operations: int) -> None:
        for _ in range(num_operations):
            with self._lock:
                stream = self._rng.choice((self._compute, self._scatter))
                if not stream:
                    continue
                head = stream[0]
                if isinstance(head, SimulatedEvent):
                    if head.reached.is_set():
                        stream.popleft()
                else:
                    stream.popleft()
                    head()

    def is_idle(self) -> bool:
        return not self._compute and not self._scatter


class RealStreams:
    """The current stream of a GPU, kept busy so that what is launched is in flight for a while."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def launch(self, function: Callable[[], Any]) -> None:
        function()

    def advance(self, num_operations: int) -> None:
        if self._rng.random() < 0.3:
            torch.cuda._sleep(self._rng.randrange(2_000_000))
        if self._rng.random() < 0.3:
            time.sleep(self._rng.random() * 1e-3)
        if self._rng.random() < 0.05:  # the launching thread is never far ahead of a real engine's
            torch.cuda.synchronize()

    def is_idle(self) -> bool:
        torch.cuda.synchronize()
        return True
