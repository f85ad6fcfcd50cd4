"""The child processes of one engine: which there are, how they are started, watched and ended."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.channel import PeerGoneError
from loraplex.engine.ipc.child import child_environment, how_it_ended, read_frame, write_frame
from loraplex.engine.ipc.messages.frontend import EngineDead
from loraplex.engine.ipc.messages.lifecycle import (
    ChildFailed,
    ChildProgress,
    ChildReady,
    ChildStart,
    Shutdown,
)

MAX_BASE_CHARS = 60  # leaves room for our names within the 107 bytes of a Unix socket's path
FRONTEND_GRACE_S = 2.0  # for a frontend to tell its clients
DEATH_GRACE_S = 3.0  # for the others to end once one has died
KILL_WAIT_S = 5.0  # for the kernel to take down what was killed
BLAME_WAIT_S = 0.5  # who fails because a peer is gone waits this long for the peer's own death

logger = logging.getLogger("loraplex")


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to start. `kind` is "frontend", "scheduler" or "worker"."""

    kind: str
    index: int
    command: list[str]

    @property
    def name(self) -> str:
        return self.kind if self.kind == "scheduler" else f"{self.kind} {self.index}"


def engine_processes(
    config: EngineConfig, worker_command: list[str] | None = None
) -> list[ProcessSpec]:
    """Returns one frontend, one scheduler, and a worker for each rank.

    Raises:
        ConfigError: `tensor_parallel_size` is above 1, and no other worker command is given.
    """
    size = config.parallel.tensor_parallel_size
    if size > 1 and worker_command is None:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but a model cannot be split over GPUs yet: set it to "
            "1, and start one engine for each GPU"
        )
    if not sys.executable:
        raise ConfigError("there is no Python executable to start the engine's processes with")

    def module(name: str) -> list[str]:
        return [sys.executable, "-P", "-m", f"loraplex.engine.processes.{name}_main"]

    worker = worker_command or module("worker")
    return [
        *(ProcessSpec("worker", rank, worker) for rank in range(size)),
        ProcessSpec("scheduler", 0, module("scheduler")),
        ProcessSpec("frontend", 0, module("frontend")),
    ]


@dataclass(eq=False)
class Process:
    """A started child and what it has reported."""

    spec: ProcessSpec
    popen: "subprocess.Popen[bytes]"
    reports: BinaryIO
    ready: ChildReady | None = None
    failed: ChildFailed | None = None
    exited: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def spawn(cls, spec: ProcessSpec, start: ChildStart) -> "Process":
        """In a session of its own, so that Ctrl-C reaches the supervisor alone."""
        reader, writer = os.pipe()
        try:
            popen = subprocess.Popen(
                [*spec.command, str(writer)],
                stdin=subprocess.PIPE,
                stdout=2,  # what the children print must not mix with the caller's own output
                pass_fds=(writer,),
                start_new_session=True,
                env=child_environment(),
            )
        except OSError as error:
            os.close(reader)
            raise ConfigError(f"cannot start {spec.name}: {error}") from None
        finally:
            os.close(writer)
        process = cls(spec, popen, os.fdopen(reader, "rb"))
        process.order(start)
        return process

    def order(self, message: object) -> None:
        """Write to its control pipe; nothing happens when it is gone."""
        with contextlib.suppress(OSError, ValueError):
            write_frame(cast(BinaryIO, self.popen.stdin), message)

    def send_signal(self, number: int) -> None:
        if not self.exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                self.popen.send_signal(number)

    def close(self) -> None:
        """Close its pipes once it has ended; before, the watching thread still reads."""
        if not self.exited.is_set():
            return
        with contextlib.suppress(OSError):
            cast(BinaryIO, self.popen.stdin).close()
        self.reports.close()

    def how_it_ended(self) -> str:
        if self.failed is not None:
            return f"{self.spec.name} failed: {self.failed.text}"
        return f"{self.spec.name} {how_it_ended(self.popen.returncode)}"


class ProcessGroup:
    """All processes of one engine. One thread each reads its reports and awaits its end.

    A process that ends before stop() is a death: the frontends pass the reason to their clients
    and every process is ended. `changed` is notified after every report, at a death, and when all
    is over.
    """

    def __init__(self, on_progress: Callable[[str], None] | None) -> None:
        self.processes: list[Process] = []
        self.culprit: Process | None = None  # whose end was the death of the engine
        self.ended = threading.Event()  # every process is gone and nothing is left of them
        self.run_dir = ""
        self.changed = threading.Condition()
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._stopping = False
        self._owner_pid = os.getpid()

    def start(self, specs: list[ProcessSpec], config: EngineConfig) -> None:
        """ConfigError when a process cannot be started; stop() is due then as well."""
        self.run_dir = _make_run_dir()
        try:
            for spec in specs:
                start = ChildStart(spec.name, spec.index, self.run_dir, config)
                self.processes.append(Process.spawn(spec, start))
        finally:  # not before all are there: a death ends all that there are
            for process in self.processes:
                name = f"watch {process.spec.name}"
                threading.Thread(
                    target=self._watch, args=(process,), name=name, daemon=True
                ).start()

    @property
    def is_ready(self) -> bool:
        return all(process.ready is not None for process in self.processes)

    def of_kind(self, kind: str) -> list[Process]:
        return [process for process in self.processes if process.spec.kind == kind]

    def stop(self, timeout_s: float) -> None:
        """End every process and wait for it; does nothing in a fork of the owner."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            first, self._stopping = not self._stopping, True
        if first:
            self._end_all(Shutdown(), timeout_s)
        else:
            self.ended.wait()

    def kill(self) -> None:
        """SIGKILL to all; the watching threads see to the rest."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _watch(self, process: Process) -> None:
        while (report := self._read_report(process)) is not None:
            if isinstance(report, ChildReady):
                process.ready = report
                self._tell(f"{process.spec.name} is ready")
            elif isinstance(report, ChildFailed):
                process.failed = report
            elif isinstance(report, ChildProgress):
                self._tell(f"{process.spec.name}: {report.text}")
            self._notify()
        process.popen.wait()
        process.exited.set()
        self._on_exit(process)

    def _read_report(self, process: Process) -> Any | None:
        try:
            return read_frame(process.reports)
        except (OSError, ValueError, codec.WireError):
            return None

    def _tell(self, text: str) -> None:
        if self._on_progress is not None:
            try:
                self._on_progress(text)
            except Exception:  # the caller's; the process must be watched all the same
                logger.exception("on_progress failed")

    def _on_exit(self, process: Process) -> None:
        if process.failed is not None and process.failed.code == PeerGoneError.code:
            self.ended.wait(BLAME_WAIT_S)  # the peer's own end says more: let it come first
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self.culprit = process
        self._notify()
        self._end_all(EngineDead(process.how_it_ended()), DEATH_GRACE_S)

    def _end_all(self, last_order: object, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        frontends = self.of_kind("frontend")
        for process in frontends:
            process.order(last_order)
        _await_exits(frontends, min(deadline, time.monotonic() + FRONTEND_GRACE_S))
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        _await_exits(self.processes, deadline)
        for process in self.processes:
            if not process.exited.is_set():
                logger.warning("%s did not end in time and is killed", process.spec.name)
                process.send_signal(signal.SIGKILL)
        _await_exits(self.processes, time.monotonic() + KILL_WAIT_S)
        for process in self.processes:
            process.close()
        for process in frontends:
            _remove_socket(process)
        if self.run_dir:
            shutil.rmtree(self.run_dir, ignore_errors=True)
        self.ended.set()
        self._notify()


def _await_exits(processes: list[Process], deadline: float) -> None:
    for process in processes:
        process.exited.wait(max(0.0, deadline - time.monotonic()))


def _remove_socket(frontend: Process) -> None:
    """A frontend that was killed leaves the file of its ipc:// endpoint behind."""
    scheme, _, path = (frontend.ready.endpoint if frontend.ready else "").partition("://")
    if scheme == "ipc":
        with contextlib.suppress(OSError):
            os.unlink(path)


def _make_run_dir() -> str:
    """A private folder (0700) with a path short enough for Unix sockets."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="loraplex-", dir=base if len(base) < MAX_BASE_CHARS else "/tmp")
