"""One worker: executes the scheduler's commands on one device and reports the results."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from loraplex.engine.adapters.adapter_folders import AdapterFolders
from loraplex.engine.adapters.loader import AdapterLoader
from loraplex.engine.adapters.loads.load import Load
from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.worker.adapters.adapter_vectors import AdapterVectors
from loraplex.engine.worker.adapters.adapter_warnings import AdapterWarnings
from loraplex.engine.worker.pending_step import PendingStep
from loraplex.engine.worker.setup import set_up
from loraplex.engine.worker.step_profile import StepProfile
from loraplex.memory.device.page_copier import Event, make_page_copier
from loraplex.scheduler.worker_protocol import (
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    UnloadAdapter,
    WorkerCommand,
    WorkerEvent,
    WorkerReady,
    int_array,
)

NUM_STEP_ENDS = 8
"""Number of last steps whose ends are kept; for an older step the oldest of them serves."""


class Worker:
    """Executes commands. Not thread-safe: one loop calls `handle` and `events`.

    A bad adapter is an event with an error. An error in a step is raised from `handle` or `events`
    and ends the worker.

    Attributes:
        ready: sizes, for the scheduler.
        parts: the page pool, the adapter table and the model runner. Callers only read them.

    Args:
        wakeup: called from other threads when `events` has something to return.
        progress: called with a line for each part of the start.
        store: path of the file by which worker ranks find each other; empty for one rank.
        on_layer: called in `handle` for each layer of a step that runs operator by operator.
        folder_server: as in ChildStart.

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
        store: str = "",
        on_layer: Callable[[], None] = lambda: None,
        folder_server: str = "",
    ) -> None:
        started_at = time.perf_counter()
        self._wakeup = wakeup
        self.parts = parts = set_up(config, rank, progress, store, on_layer)
        profiled = bool(config.profile.profile_dir)
        self._profile = StepProfile(config.profile, rank) if profiled else None
        self._events: queue.SimpleQueue[WorkerEvent | Load | BaseException] = queue.SimpleQueue()
        self._copier = make_page_copier(parts.pool)
        self._step_ends: deque[tuple[int, Event]] = deque(maxlen=NUM_STEP_ENDS)
        self._loader = AdapterLoader(
            reader=parts.reader,
            table=parts.table,
            copier=self._copier,
            host_bytes=config.memory.adapter_host_bytes,
            report=self._report,
            enter_thread=lambda: _enter_thread(parts.device),
            find_warnings=AdapterWarnings(config.model, resolve_model(config.model.model)),
            finisher=AdapterVectors(parts.model, parts.pool, parts.ranks, parts.target.packing),
        )
        self._loader.folders = AdapterFolders(folder_server)
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
            lora_backend=parts.backends.lora.name,
            attention_backend=parts.backends.attention.name,
            linear_backend=parts.backends.linear.name,
            weight_bytes=parts.weight_bytes,
            adapter_rank=parts.adapter_rank,
            adapter_bytes=parts.adapter_pages * parts.pool.shape.bytes_over_layers,
            load_seconds=time.perf_counter() - started_at,
            base_fingerprint=parts.base_fingerprint,
            eos_token_ids=int_array(parts.spec.eos_token_ids),
        )

    def handle(self, command: WorkerCommand) -> None:
        """Begin a command. `events` gives its result; steps' results keep the plans' order."""
        match command:
            case StepPlan():
                self._run(command)
            case InspectAdapter():
                self._loader.inspect(command)
            case LoadAdapter():
                self._loader.load(command, self._end_of(command.after_step))
            case UnloadAdapter():
                self._loader.unload(command.adapter_slot)
            case DropAdapter():
                self._loader.drop(command.content_hash)
            case _:
                raise TypeError(f"a worker does not take {type(command).__name__}")

    def _end_of(self, step_id: int) -> Event:
        """Return an event that is reached once the step has run, and no sooner."""
        for ended_id, event in self._step_ends:
            if ended_id >= step_id:
                return event
        return self._copier.record_event()

    def _run(self, plan: StepPlan) -> None:
        started_at = time.perf_counter()
        step = self.parts.runner.launch(plan)
        if self._profile is not None:
            self._profile.launched(plan, started_at)
        self._step_ends.append((plan.step_id, self._copier.record_event()))
        if self.parts.device.type == "cuda":
            self._steps.put(step)
        else:
            self._events.put(step.result())

    def events(self, timeout_s: float = 0.0) -> list[WorkerEvent]:
        """Returns the events since the last call. Waits up to `timeout_s` for a first one."""
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
            event = self._loader.finish(item) if isinstance(item, Load) else item
            if self._profile is not None and isinstance(event, StepResult):
                self._profile.finished(event)
            events.append(event)

    def close(self) -> None:
        """Stop the threads. Reads that have not begun are dropped."""
        self._loader.close()
        self._steps.put(None)
        self.close_profile()

    def close_profile(self) -> None:
        """Write the timeline that is being recorded. Waits for no thread."""
        if self._profile is not None:
            self._profile.close()

    def _await_steps(self) -> None:
        _enter_thread(self.parts.device)
        while (step := self._steps.get()) is not None:
            try:
                self._report(step.result())
            except BaseException as error:  # a GPU fault: `events` raises it, on the loop
                self._report(error)
                return

    def _report(self, item: WorkerEvent | Load | BaseException) -> None:
        self._events.put(item)
        self._wakeup()


def _enter_thread(device: torch.device) -> None:
    """Select the worker's GPU: a new thread starts on GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
