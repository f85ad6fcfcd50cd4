"""Starts engines on one machine and a router before them, and starts again what ends."""

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loraplex.engine.cluster.engine_list import EngineList, ListedEngine
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError, LoraplexError
from loraplex.engine.frontend.client_socket import check_server_config
from loraplex.engine.processes.engine import STOP_TIMEOUT_S, Engine
from loraplex.engine.processes.process import Environment, ProcessSpec
from loraplex.engine.processes.process_group import ProcessGroup
from loraplex.engine.processes.restart_policy import RestartPolicy
from loraplex.scheduler.placement.placement import POLICIES

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"

logger = logging.getLogger("loraplex.cluster")


def device_environment(index: int, num_devices: int) -> Environment:
    """Returns the variables that give engine `index` its own `num_devices` GPUs.

    Raises ConfigError if the caller sees fewer GPUs than that engine needs.
    """
    first = index * num_devices
    visible = os.environ.get(DEVICES_VARIABLE)
    names = [str(i) for i in range(first + num_devices)] if visible is None else visible.split(",")
    mine = names[first : first + num_devices]
    if visible and len(mine) < num_devices:
        raise ConfigError(
            f"engine {index} needs GPUs {first} to {first + num_devices - 1} of the "
            f"{len(names)} in {DEVICES_VARIABLE}: ask for fewer engines"
        )
    return ((DEVICES_VARIABLE, ",".join(mine)),)


class EngineCluster:
    """Equal engines behind one endpoint, each with its own devices.

    An engine that ends is started again under another name; its requests go on elsewhere meanwhile.
    A router that ends is started again and finds its engines; its clients must send again. Nothing
    outlives this object or this process.

    Attributes (once started):
        endpoint: the address for clients, as for one engine.
    """

    endpoint: str

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_engines: int,
        placement: str = "affinity",
        on_progress: Callable[[str], None] | None = None,
        worker_command: list[str] | None = None,
    ) -> None:
        """Makes a cluster that is not started.

        Raises ConfigError: no engines are asked for, the placement is unknown, or HTTP is.
        """
        if num_engines < 1:
            raise ConfigError(f"a cluster needs at least 1 engine, got {num_engines}")
        if placement not in POLICIES:
            raise ConfigError(f"placement must be one of {', '.join(POLICIES)}, got {placement!r}")
        if config.server.http:
            raise ConfigError("a cluster has no HTTP server yet: leave --http out")
        if config.server.num_frontends > 1:
            raise ConfigError("a cluster has one router: leave num_frontends out")
        self._config = config
        self._placement = placement
        self._on_progress = on_progress
        self._worker_command = worker_command
        self._router = ProcessGroup(on_progress)
        self._slots = [_Slot(index) for index in range(num_engines)]
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    @property
    def engines(self) -> dict[str, Engine]:
        """The engines that are up, by name."""
        with self._lock:
            return {s.engine_id: s.engine for s in self._slots if s.engine is not None}

    @property
    def router_pid(self) -> int:
        return self._router.processes[0].popen.pid

    @property
    def dead_reason(self) -> str | None:
        """How the router ended for good; None while it lives or was stopped."""
        return self._router.dead_reason or None

    def start(self, timeout_s: float = 600.0) -> None:
        """Start all engines and the router and wait until all are ready.

        Raises:
            ConfigError: an engine cannot start as configured; the text says what to change.
            EngineDeadError: a process ended or was not ready in time. Nothing is left running.
        """
        check_server_config(self._config.server)
        deadline = time.monotonic() + timeout_s
        weakref.finalize(self, _stop, self._router, self._slots, self._stopping)
        try:
            for slot in self._slots:
                name = f"engine {slot.index}"
                threading.Thread(target=self._keep, args=(slot,), name=name, daemon=True).start()
            for slot in self._slots:
                slot.started.wait(max(0.0, deadline - time.monotonic()))
                if slot.failure is not None:
                    raise slot.failure
                if slot.engine is None:
                    raise EngineDeadError(f"engine {slot.index} did not get ready in time")
            command = [sys.executable, "-P", "-m", "loraplex.engine.cluster.router_main"]
            self._router.start([ProcessSpec("router", 0, command)], self._config)
            self._write_list()
            self._await_router(deadline)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the router, then the engines. Idempotent; waits until all are gone."""
        _stop(self._router, self._slots, self._stopping)

    def drain(self, engine_id: str) -> None:
        """Move an engine's requests to the others. It gets no more. Raises KeyError if unknown."""
        with self._lock:
            {slot.engine_id: slot for slot in self._slots}[engine_id].draining = True
        self._write_list()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Block until the cluster ends. Returns 0 after stop(), 1 if the router died for good."""
        if not self._router.ended.wait(timeout_s):
            return None
        return 1 if self._router.dead_reason else 0

    def _await_router(self, deadline: float) -> None:
        group = self._router
        with group.changed:
            while not group.is_ready and not group.dead_reason:
                if time.monotonic() >= deadline:
                    raise EngineDeadError("the router did not get ready in time")
                group.changed.wait(1.0)
        (router,) = group.processes
        if group.dead_reason or router.ready is None:
            text = router.failed.text if router.failed else group.dead_reason
            raise EngineDeadError(text)
        self.endpoint = router.ready.endpoint
        group.allow_restarts()

    def _keep(self, slot: "_Slot") -> None:
        """Run one engine after the other in a slot until the cluster stops."""
        restarts = RestartPolicy()
        while not self._stopping.is_set():
            engine = self._start_engine(slot)
            if engine is not None:
                engine.wait()
                with self._lock:
                    slot.engine = None
                if self._stopping.is_set():
                    return
                logger.warning("%s has ended: %s", slot.engine_id, engine.dead_reason)
                self._write_list()
            elif slot.failure is not None:
                return  # of the first start; start() raises it
            delay_s = restarts.on_death(time.monotonic())
            if delay_s is None:
                logger.error("engine %d ends too often and is not started again", slot.index)
                return
            self._stopping.wait(delay_s)

    def _start_engine(self, slot: "_Slot") -> Engine | None:
        server = replace(self._config.server, endpoint="", http="")
        try:
            engine = Engine(
                replace(self._config, server=server),
                on_progress=self._on_progress,
                worker_command=self._worker_command,
                environment=device_environment(
                    slot.index, self._config.parallel.tensor_parallel_size
                ),
            )
            slot.latest = engine
            engine.start()
        except (LoraplexError, OSError) as error:
            if not slot.started.is_set():
                slot.failure = error
                slot.started.set()
            logger.warning("engine %d cannot start: %s", slot.index, error)
            return None
        with self._lock:
            slot.num_starts += 1
            slot.engine, slot.draining = engine, False
        slot.started.set()
        if self._stopping.is_set():
            engine.stop()
        self._write_list()
        return engine

    def _write_list(self) -> None:
        with self._lock:
            engines = [
                ListedEngine(slot.engine_id, slot.engine.scheduler_endpoint, slot.draining)
                for slot in self._slots
                if slot.engine is not None
            ]
            folder = Path(self._router.run_dir) if self._router.run_dir else None
            if folder is not None and folder.is_dir():
                EngineList(self._placement, engines).write(folder)

    def __enter__(self) -> "EngineCluster":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class _Slot:
    """One engine's place: its devices, and the engine that runs there now."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_starts = 0
        self.engine: Engine | None = None
        self.draining = False
        self.latest: Engine | None = None  # started last; it may not be up
        self.failure: Exception | None = None  # of the first start
        self.started = threading.Event()  # the first start has succeeded or failed

    @property
    def engine_id(self) -> str:
        """Name of the present engine; each start gets another one."""
        return f"engine-{self.index}.{self.num_starts}"


def _stop(router: ProcessGroup, slots: list[_Slot], stopping: threading.Event) -> None:
    stopping.set()
    router.stop(STOP_TIMEOUT_S)
    for slot in slots:
        if slot.latest is not None:
            slot.latest.stop()
