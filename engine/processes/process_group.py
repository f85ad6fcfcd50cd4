"""The child processes of one engine: starts, watches, restarts and ends them."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.channel import PeerGoneError
from loraplex.engine.ipc.child import read_frame
from loraplex.engine.ipc.messages.frontend import EngineDead
from loraplex.engine.ipc.messages.lifecycle import (
    ChildBeat,
    ChildDrained,
    ChildFailed,
    ChildProgress,
    ChildReady,
    ChildStart,
    ChildStatus,
    Drain,
    Shutdown,
    WorkerHangs,
)
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.engine.processes.addresses.shared_address import SharedAddress, open_addresses
from loraplex.engine.processes.process import Process, ProcessSpec
from loraplex.engine.processes.restart_policy import MAX_DEATHS, WINDOW_S, RestartPolicy
from loraplex.engine.processes.watchdog import LOOK_S, Watchdog

MAX_BASE_CHARS = 60  # leaves room for file names within the 107 bytes of a Unix socket's path
FRONTEND_GRACE_S = 2.0  # for a frontend to send the reason to its clients
DEATH_GRACE_S = 3.0  # for the other processes to end once one has died
KILL_WAIT_S = 5.0  # for the kernel to end a process that was killed
PEER_WAIT_S = 0.5  # a process that fails because its peer is gone waits for the peer's own end

CLIENT_KINDS = ("frontend", "http", "router")
"""Processes that serve clients. They are stopped first and, once up, started again."""

KINDS_TOLD = ("scheduler", *CLIENT_KINDS)
"""Processes that know the tenants."""

logger = logging.getLogger("loraplex")


class ProcessGroup:
    """All processes of one engine. A thread for each reads its reports and awaits its end. One
    more kills those that hang, so that a hang is a death.

    A process that ends before stop() ends the engine: frontends pass the reason to their clients,
    and every process is stopped. After allow_restarts() a frontend is started again instead, unless
    it dies too often.

    Attributes:
        processes: the current process of each spec.
        tenants: what scheduler and frontends are told of tenants. Set it before start().
        dead_process: the process whose end ended the engine.
        dead_reason: how that process ended; empty while the engine lives.
        changed: notified after every report, at the end of the engine, and when all is over.
        ended: set when every process is gone and nothing is left of them.
    """

    def __init__(
        self,
        on_progress: Callable[[str], None] | None,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        self.processes: list[Process] = []
        self.tenants = TenantTable()
        self.dead_process: Process | None = None
        self.dead_reason = ""
        self.ended = threading.Event()
        self.run_dir = ""
        self.changed = threading.Condition()
        self._addresses: dict[str, SharedAddress] = {}  # by kind of process
        self._on_progress = on_progress
        self._on_status = on_status
        self._lock = threading.Lock()  # guards the start of a process against the end of all
        self._stopping = threading.Event()
        self._is_draining = self._is_killed = False
        self._restarts: dict[str, RestartPolicy] = {}  # by name; empty until allow_restarts()
        self._owner_pid = os.getpid()

    def start(self, specs: list[ProcessSpec], config: EngineConfig) -> None:
        """Raises ConfigError when a process cannot be started; the caller must stop() then too."""
        self.run_dir = _make_run_dir()
        self._addresses = open_addresses(config.server, self.run_dir)
        try:
            for spec in specs:
                start = ChildStart(
                    spec.name,
                    spec.index,
                    self.run_dir,
                    config,
                    host=spec.host,
                    folder_server=spec.folder_server,
                )
                if spec.kind in KINDS_TOLD:
                    start.tenants = self.tenants
                address = self._addresses.get(spec.kind)
                self.processes.append(Process.spawn(spec, start, address))
        finally:  # only when all are there: the end of one stops all that are in the list
            for process in self.processes:
                self._watch_in_thread(process)
        timeout_s = config.process.watchdog_timeout
        if timeout_s:
            threading.Thread(
                target=self._end_hung, args=(Watchdog(timeout_s),), name="watchdog", daemon=True
            ).start()

    def allow_restarts(self) -> None:
        """From now on the end of a frontend does not end the engine."""
        self._restarts = {
            process.spec.name: RestartPolicy() for process in self.of_kind(*CLIENT_KINDS)
        }

    def set_tenants(self, tenants: TenantTable) -> None:
        """Tell the scheduler and the frontends, also those that are started later."""
        with self._lock:
            self.tenants = tenants
            for process in self.of_kind(*KINDS_TOLD):
                process.start.tenants = tenants
                process.send(tenants)

    @property
    def is_ready(self) -> bool:
        return all(process.ready is not None for process in self.processes)

    def of_kind(self, *kinds: str) -> list[Process]:
        return [process for process in self.processes if process.spec.kind in kinds]

    def begin_drain(self, grace_s: float) -> None:
        """Have the processes that serve clients accept requests for `grace_s` more.

        One that dies from now on is not started again.
        """
        self._is_draining = True
        for process in self.of_kind(*CLIENT_KINDS):
            process.send(Drain(grace_s))

    @property
    def is_drained(self) -> bool:
        """Tells whether all that drain have no request left, or are gone."""
        return all(
            process.is_drained or process.exited.is_set() for process in self.of_kind(*CLIENT_KINDS)
        )

    def stop(self, timeout_s: float, reason: str = "") -> None:
        """End every process and wait for it; do nothing in a fork of the owner.

        Requests that have not ended fail with `reason`.
        """
        if os.getpid() != self._owner_pid:
            return
        if self._begin_stop():
            self._end_all(Shutdown(reason), timeout_s)
        else:
            self.ended.wait()

    def kill(self) -> None:
        """Send SIGKILL to all, and start none again. Call stop() then. Takes no lock."""
        self._is_killed = True
        for process in self.processes:
            process.send_signal(signal.SIGKILL)

    def _begin_stop(self) -> bool:
        """Returns True for the first caller. No process is started after this returns."""
        with self._lock:
            is_first = not self._stopping.is_set()
            self._stopping.set()
            return is_first

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _watch_in_thread(self, process: Process) -> None:
        name = f"watch {process.spec.name}"
        threading.Thread(target=self._watch, args=(process,), name=name, daemon=True).start()

    def _watch(self, process: Process) -> None:
        while (report := _read_report(process)) is not None:
            if isinstance(report, ChildBeat):
                process.beat = report
                continue
            if isinstance(report, WorkerHangs):
                self.of_kind("worker")[report.rank].reported_hang = report.how
                continue
            if isinstance(report, ChildReady):
                process.ready = report
                self._tell(self._on_progress, f"{process.spec.name} is ready")
            elif isinstance(report, ChildFailed):
                process.failed = report
            elif isinstance(report, ChildDrained):
                process.is_drained = True
            elif isinstance(report, ChildProgress):
                self._tell(self._on_progress, f"{process.spec.name}: {report.text}")
            elif isinstance(report, ChildStatus):
                self._tell(self._on_status, report.text)
            self._notify()
        process.popen.wait()
        process.exited.set()
        self._on_exit(process)

    def _end_hung(self, watchdog: Watchdog) -> None:
        """Kill processes that hang, until the engine is stopped."""
        while not self._stopping.wait(LOOK_S):
            for process, how in watchdog.look(self.processes, are_started=bool(self._restarts)):
                process.hang = how
                process.send_signal(signal.SIGKILL)
                if not process.exited.wait(KILL_WAIT_S):  # the kernel waits for a device or a disk
                    self._end_engine(process, f"{process.spec.name} {how} and cannot be killed")

    def tell_status(self, text: str) -> None:
        self._tell(self._on_status, text)

    def _tell(self, callback: Callable[[str], None] | None, text: str) -> None:
        if callback is not None:
            try:
                callback(text)
            except Exception:  # an error of the caller must not end the watch
                logger.exception("a callback of the engine failed")

    def _on_exit(self, process: Process) -> None:
        if process.failed is not None and process.failed.code == PeerGoneError.code:
            self.ended.wait(PEER_WAIT_S)  # the end of its peer says more: let it come first
        if self._stopping.is_set() or self._is_killed:
            return
        reason = process.how_it_ended()
        if self._is_draining and process.spec.kind in CLIENT_KINDS:
            logger.warning("%s; the requests of its clients have failed", reason)
            return
        restarts = self._restarts.get(process.spec.name)
        if restarts is not None:
            delay_s = restarts.on_death(time.monotonic())
            if delay_s is not None:
                self._restart(process, delay_s)
                return
            reason += f", for the {MAX_DEATHS}th time within {WINDOW_S:g} s"
        self._end_engine(process, reason)

    def _restart(self, process: Process, delay_s: float) -> None:
        """Replace a process that has ended, after `delay_s`, unless the engine is stopped."""
        logger.warning(
            "%s; the requests of its clients have failed, and it is started again in %g s",
            process.how_it_ended(),
            delay_s,
        )
        if self._stopping.wait(delay_s) or self._is_draining:
            return
        try:
            with self._lock:
                if self._stopping.is_set():
                    return
                fresh = process.respawn(self._addresses.get(process.spec.kind))
                self.processes[self.processes.index(process)] = fresh
        except ConfigError as error:
            self._end_engine(process, f"{process.how_it_ended()}, and {error}")
            return
        process.close()
        self._watch_in_thread(fresh)

    def _end_engine(self, process: Process, reason: str) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            self.dead_process, self.dead_reason = process, reason
            self._stopping.set()
        self._notify()
        self._end_all(EngineDead(reason), DEATH_GRACE_S)

    def _end_all(self, last_message: object, timeout_s: float) -> None:
        for address in self._addresses.values():
            address.close()
        deadline = time.monotonic() + timeout_s
        frontends = self.of_kind(*CLIENT_KINDS)
        for process in frontends:
            process.send(last_message)
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


def _read_report(process: Process) -> Any | None:
    """Returns the next report, or None when the process has closed its end."""
    try:
        return read_frame(process.reports)
    except (OSError, ValueError, codec.WireError):
        return None


def _await_exits(processes: list[Process], deadline: float) -> None:
    for process in processes:
        process.exited.wait(max(0.0, deadline - time.monotonic()))


def _remove_socket(frontend: Process) -> None:
    """Remove the file of an ipc:// endpoint, which a frontend that was killed leaves behind."""
    scheme, _, path = frontend.endpoint.partition("://")
    if scheme == "ipc":
        with contextlib.suppress(OSError):
            os.unlink(path)


def _make_run_dir() -> str:
    """Returns a new private folder (0700) with a path short enough for Unix sockets."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="loraplex-", dir=base if len(base) < MAX_BASE_CHARS else "/tmp")
