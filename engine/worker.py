"""One worker: executes the scheduler's commands on one device and reports what comes of them."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.engine.adapters import read_adapter
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import AdapterError
from loraplex.engine.pending_step import PendingStep
from loraplex.engine.worker_setup import set_up
from loraplex.memory.adapter_layout import MODULES
from loraplex.memory.host_store import HostStore, PackedAdapter
from loraplex.scheduler.plan import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    UnloadAdapter,
    WorkerCommand,
    WorkerEvent,
    WorkerReady,
    int_array,
)

logger = logging.getLogger("loraplex")

NUM_READERS = 2
"""Threads that read, check and hash adapters."""


@dataclass(frozen=True, slots=True)
class _ReadyToLoad:
    """What a LoadAdapter asked for is in the host store, pinned; or there is an error."""

    command: LoadAdapter
    started_at: float
    adapter: PackedAdapter | None
    error: str = ""


class Worker:
    """Not thread-safe: one loop calls `handle` and `events`. An adapter that is no good is an
    answer, an error in a step is raised from `handle` or `events` and ends the worker.

    Attributes:
        ready: sizes, for the scheduler.

    Args:
        wakeup: called from other threads when `events` has something to return.
        progress: told how far the start has come.

    Raises:
        ConfigError: the engine cannot start as configured.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int = 0,
        *,
        wakeup: Callable[[], None] = lambda: None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        started_at = time.perf_counter()
        self._wakeup = wakeup
        self._parts = parts = set_up(config, rank, progress)
        self._store = HostStore(config.memory.adapter_host_bytes)
        self._events: queue.SimpleQueue[WorkerEvent | _ReadyToLoad | BaseException] = (
            queue.SimpleQueue()
        )
        self._loading: dict[int, LoadAdapter] = {}
        self._readers = ThreadPoolExecutor(
            NUM_READERS, "adapter-reader", initializer=_enter_thread, initargs=(parts.device,)
        )
        self._steps: queue.SimpleQueue[PendingStep | None] = queue.SimpleQueue()
        if parts.device.type == "cuda":
            threading.Thread(target=self._await_steps, name="step-waiter", daemon=True).start()
        self.ready = WorkerReady(
            rank=rank,
            num_pages=parts.pool.num_pages,
            page_bytes=parts.pool.shape.page_bytes,
            num_layers=parts.spec.num_layers,
            max_model_len=parts.max_model_len,
            vocab_size=parts.spec.vocab_size,
            device=_device_name(parts.device),
            lora_backend=parts.lora_backend,
            attention_backend=parts.attention_backend,
            load_seconds=time.perf_counter() - started_at,
            base_fingerprint=f"{parts.spec.fingerprint}:{parts.target.dtype}",
            eos_token_ids=int_array(parts.spec.eos_token_ids),
        )

    def handle(self, command: WorkerCommand) -> None:
        """Begin a command. What comes of it is in `events`, of steps in the order of the plans."""
        match command:
            case StepPlan():
                step = self._parts.runner.launch(command)
                if self._parts.device.type == "cuda":
                    self._steps.put(step)
                else:
                    self._events.put(step.result())
            case InspectAdapter():
                self._readers.submit(self._inspect, command)
            case LoadAdapter():
                self._begin_load(command)
            case UnloadAdapter():
                self._loading.pop(command.adapter_slot, None)
                self._parts.table.clear(command.adapter_slot)
            case _:
                raise TypeError(f"a worker has no use for {type(command).__name__}")

    def events(self, timeout_s: float = 0.0) -> list[WorkerEvent]:
        """All that has come since the last call; waits up to `timeout_s` for a first one."""
        events: list[WorkerEvent] = []
        deadline = time.monotonic() + timeout_s
        while True:
            left = 0.0 if events else deadline - time.monotonic()
            try:
                item = self._events.get(timeout=left) if left > 0 else self._events.get_nowait()
            except queue.Empty:
                return events
            if isinstance(item, BaseException):
                raise item
            events.append(self._finish_load(item) if isinstance(item, _ReadyToLoad) else item)

    def close(self) -> None:
        """Stop the threads; reads that have not begun are dropped."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._steps.put(None)

    def _await_steps(self) -> None:
        _enter_thread(self._parts.device)
        while (step := self._steps.get()) is not None:
            try:
                self._report(step.result())
            except BaseException as error:  # a GPU fault: raised from events(), on the loop
                self._report(error)
                return

    def _report(self, item: WorkerEvent | _ReadyToLoad | BaseException) -> None:
        self._events.put(item)
        self._wakeup()

    def _inspect(self, command: InspectAdapter) -> None:
        try:
            adapter = read_adapter(command.name, Path(command.path), self._parts.target)
            self._store.add(adapter)
            self._report(_describe(command, adapter))
        except Exception as error:
            text = _explain(command.name, error)
            self._report(AdapterInspected(name=command.name, path=command.path, error=text))

    def _begin_load(self, command: LoadAdapter) -> None:
        self._loading[command.adapter_slot] = command
        started_at = time.perf_counter()
        adapter = self._store.pin(command.content_hash)
        if adapter is not None:
            self._events.put(_ReadyToLoad(command, started_at, adapter))
        else:
            self._readers.submit(self._read_again, command, started_at)

    def _read_again(self, command: LoadAdapter, started_at: float) -> None:
        """The host store dropped it; what is at the path now must still be the same content."""
        name = Path(command.path).name
        try:
            adapter = read_adapter(name, Path(command.path), self._parts.target)
            if adapter.content_hash != command.content_hash:
                raise AdapterError(
                    f"adapter {name!r}: the files in {command.path} have changed since it was "
                    "registered; unload it and register it again"
                )
            adapter = self._store.add(adapter, pin=True)
            self._report(_ReadyToLoad(command, started_at, adapter))
        except Exception as error:
            self._report(_ReadyToLoad(command, started_at, None, _explain(name, error)))

    def _finish_load(self, ready: _ReadyToLoad) -> AdapterLoaded:
        command, adapter, error = ready.command, ready.adapter, ready.error
        is_wanted = self._loading.get(command.adapter_slot) is command
        if is_wanted:
            del self._loading[command.adapter_slot]
        if adapter is not None:
            if not is_wanted:
                error = "it was unloaded before its load was done"
            elif adapter.num_pages != len(command.page_ids):
                error = f"it needs {adapter.num_pages} pages, not {len(command.page_ids)}"
            else:
                page_ids = torch.tensor(command.page_ids, dtype=torch.int32)
                self._parts.pool.write_pages(self._to_device(page_ids.long()), adapter.data)
                self._parts.table.fill(command.adapter_slot, adapter, page_ids)
            self._store.unpin(command.content_hash)
        return AdapterLoaded(
            adapter_slot=command.adapter_slot,
            content_hash=command.content_hash,
            error=error,
            load_us=int((time.perf_counter() - ready.started_at) * 1e6),
        )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._parts.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._parts.device, non_blocking=True)


def _enter_thread(device: torch.device) -> None:
    """A thread starts on GPU 0, whichever the worker's is."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _describe(command: InspectAdapter, adapter: PackedAdapter) -> AdapterInspected:
    used = adapter.rank.amax(dim=0).tolist()
    return AdapterInspected(
        name=command.name,
        path=command.path,
        content_hash=adapter.content_hash,
        num_pages=adapter.num_pages,
        num_bytes=adapter.num_bytes,
        max_rank=max(used),
        modules=[name for name, rank in zip(MODULES, used, strict=True) if rank],
    )


def _explain(name: str, error: Exception) -> str:
    if isinstance(error, AdapterError):
        return str(error)
    logger.exception("reading adapter %s failed", name, exc_info=error)
    return f"adapter {name!r}: reading it failed: {type(error).__name__}: {error}"


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
