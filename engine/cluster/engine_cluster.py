"""Starts engines and routers before them, and starts again what ends."""

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loraplex.engine.cluster.autoscaler import Autoscaler
from loraplex.engine.cluster.engine_list import EngineList
from loraplex.engine.cluster.engine_slots import EngineSlots
from loraplex.engine.cluster.launch.launcher import EngineHandle
from loraplex.engine.cluster.launch.launchers import make_launcher
from loraplex.engine.cluster.scale_signals import read_signals
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.frontend.client_socket import check_client_keys, check_server_config
from loraplex.engine.frontend.mixing.named_mixes import check_adapter_config
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.engine.kv_events.kv_events_config import check_shared_kv_events
from loraplex.engine.processes.addresses.http_address import check_http_config
from loraplex.engine.processes.draining.drain import drain
from loraplex.engine.processes.draining.stop_signals import StopSignals
from loraplex.engine.processes.engine import STOP_TIMEOUT_S
from loraplex.engine.processes.process import ProcessSpec
from loraplex.engine.processes.process_group import ProcessGroup
from loraplex.engine.stores.open_stores import check_stores, only_folders
from loraplex.engine.tenants.hangup_reload import HangupReload
from loraplex.engine.tenants.key_file import read_tenants_of
from loraplex.scheduler.placement.placement import POLICIES
from loraplex.scheduler.placement.scaling import ScalePolicy

ROUTER_MODULE = "loraplex.engine.cluster.router_main"
HTTP_MODULE = "loraplex.entrypoints.http.cluster_main"
SCALE_HOLD_S = 60.0


class EngineCluster:
    """Equal engines behind one endpoint, each with its own devices.

    An engine that ends is started again under another name; its requests go on elsewhere meanwhile.
    A router that ends is started again and finds its engines; its clients must send again. Nothing
    outlives this object or this process.

    Attributes (once started):
        endpoint: the address for clients, as for one engine.
        http_endpoint: HOST:PORT of the HTTP server, "" if there is none.
    """

    endpoint: str
    http_endpoint: str = ""

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_engines: int,
        max_engines: int | None = None,
        placement: str = "affinity",
        ray_address: str = "",
        scale_hold_s: float = SCALE_HOLD_S,
        on_progress: Callable[[str], None] | None = None,
        worker_command: list[str] | None = None,
    ) -> None:
        """Makes a cluster that is not started.

        Args:
            num_engines: that start, and the fewest.
            max_engines: that run under load; None: always `num_engines`.
            ray_address: where engines run; see make_launcher().
            scale_hold_s: for which there must be room before an engine is released.

        Raises:
            ConfigError: no engines are asked for, the placement is unknown, or Ray is asked for and
                cannot be used.
        """
        if num_engines < 1:
            raise ConfigError(f"a cluster needs at least 1 engine, got {num_engines}")
        max_engines = num_engines if max_engines is None else max_engines
        if max_engines < num_engines:
            raise ConfigError(
                f"the most engines ({max_engines}) are fewer than the fewest ({num_engines})"
            )
        if placement not in POLICIES:
            raise ConfigError(f"placement must be one of {', '.join(POLICIES)}, got {placement!r}")
        self._config = config
        self._placement = placement
        self._routers = ProcessGroup(on_progress)
        self._launcher = make_launcher(
            replace(
                config,
                server=replace(config.server, endpoint="", http="", num_frontends=1, api_keys=""),
                store=only_folders(config.store),  # routers look names up
            ),
            ray_address=ray_address,
            on_progress=on_progress,
            worker_command=worker_command,
        )
        self._num_engines = num_engines
        self._max_engines = max_engines
        self._slots = EngineSlots(self._launcher, self._write_list)
        self._scaler: Autoscaler | None = None
        if max_engines > num_engines:
            policy = ScalePolicy(
                min_engines=num_engines, max_engines=max_engines, hold_s=scale_hold_s
            )
            self._scaler = Autoscaler(
                self._slots,
                policy,
                read_signals=lambda: read_signals(Path(self._routers.run_dir)),
                on_change=self._write_list,
            )
        self._lock = threading.Lock()  # guards the list's file

    @property
    def engines(self) -> dict[str, EngineHandle]:
        """The engines that are up, by name."""
        return self._slots.engines

    @property
    def router_pid(self) -> int:
        """The process id of the first router."""
        return self._routers.of_kind("router")[0].popen.pid

    @property
    def dead_reason(self) -> str | None:
        """How the router ended for good; None while it lives or was stopped."""
        return self._routers.dead_reason or None

    def describe_launcher(self) -> str:
        """Returns where the engines run, in words."""
        return self._launcher.describe()

    def start(self, timeout_s: float = 600.0) -> None:
        """Start all engines and the router and wait until all are ready.

        Raises:
            ConfigError: an engine cannot start as configured; the text says what to change.
            EngineDeadError: a process ended or was not ready in time. Nothing is left running.
        """
        check_server_config(self._config.server)
        check_http_config(self._config.server)
        check_shared_kv_events(self._config.server)
        check_adapter_config(self._config.adapter)
        check_stores(self._config)
        self._routers.tenants = self._read_tenants()
        deadline = time.monotonic() + timeout_s
        weakref.finalize(self, _stop, self._routers, self._slots, self._scaler)
        try:
            self._launcher.open(self._max_engines)
            for _ in range(self._num_engines):
                self._slots.add()
            for slot in self._slots:
                slot.await_start(deadline)
            self._routers.start(router_processes(self._config), self._config)
            self._write_list()
            self._await_routers(deadline)
            if self._scaler is not None:
                self._scaler.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the router, then the engines. Idempotent; waits until all are gone."""
        _stop(self._routers, self._slots, self._scaler)

    def reload_keys(self) -> None:
        """Read `api_keys` and `client_public_keys_dir` again. Requests that run go on.

        Raises:
            ConfigError: a file is not as it must be; the old keys stay.
        """
        check_client_keys(self._config.server)
        self._routers.set_tenants(self._read_tenants())

    def _read_tenants(self) -> TenantTable:
        """Raises ConfigError for limits and weights, which no process of a cluster could keep."""
        table = read_tenants_of(self._config.server)
        for tenant in table.tenants:
            if tenant.is_limited or tenant.weight is not None:
                raise ConfigError(
                    f"api_keys {self._config.server.api_keys}: tenants.{tenant.name} has a weight "
                    "or limits, which a cluster does not keep: remove them; --fair-share-weight "
                    "takes weights"
                )
        return table

    def serve(self, on_ready: "Callable[[EngineCluster], None] | None" = None) -> int:
        """Start, call `on_ready`, and wait. Returns and stops as Engine.serve() does."""
        reason = ""
        self.start()
        try:
            reload = HangupReload(self.reload_keys if self._config.server.has_keys else None)
            with StopSignals(self._on_signal) as signals, contextlib.closing(reload):
                if on_ready is not None:
                    on_ready(self)
                while not signals.count and not self._routers.ended.is_set():
                    signals.wait(0.5)
                    reload.run_pending()
                if signals.count:
                    reason = drain(self._routers, self._config.server, signals)
                _stop(self._routers, self._slots, self._scaler, reason)
        finally:
            self.stop()
        return 1 if self.dead_reason else 0

    def _on_signal(self, count: int) -> None:
        if count > 1:
            self._routers.kill()

    def drain(self, engine_id: str) -> None:
        """Move an engine's requests to the others. It gets no more. Raises KeyError if unknown."""
        self._slots.drain(engine_id)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Block until the cluster ends. Returns 0 after stop(), 1 if the router died for good."""
        if not self._routers.ended.wait(timeout_s):
            return None
        return 1 if self._routers.dead_reason else 0

    def _await_routers(self, deadline: float) -> None:
        group = self._routers
        with group.changed:
            while not group.is_ready and not group.dead_reason:
                if time.monotonic() >= deadline:
                    raise EngineDeadError("the router did not get ready in time")
                group.changed.wait(1.0)
        if group.dead_process is not None:
            failed = group.dead_process.failed
            raise EngineDeadError(failed.text if failed else group.dead_reason)
        self.endpoint = group.of_kind("router")[0].endpoint
        for http in group.of_kind("http"):
            self.http_endpoint = http.endpoint
        group.allow_restarts()

    def _write_list(self) -> None:
        with self._lock:
            scale = self._scaler.counts if self._scaler is not None else None
            folder = Path(self._routers.run_dir)
            if self._routers.run_dir and folder.is_dir():
                with contextlib.suppress(FileNotFoundError):  # the router was stopped meanwhile
                    EngineList(self._placement, self._slots.listed, scale).write(folder)

    def __enter__(self) -> "EngineCluster":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def router_processes(config: EngineConfig) -> list[ProcessSpec]:
    """Returns the routers for ZeroMQ, and the HTTP servers, which are routers too."""
    python = [sys.executable, "-P", "-m"]
    numbers = range(config.server.num_frontends)
    return [
        *(ProcessSpec("router", i, [*python, ROUTER_MODULE]) for i in numbers),
        *(ProcessSpec("http", i, [*python, HTTP_MODULE]) for i in numbers if config.server.http),
    ]


def _stop(
    routers: ProcessGroup, slots: EngineSlots, scaler: Autoscaler | None, reason: str = ""
) -> None:
    if scaler is not None:
        scaler.stop()
    routers.stop(STOP_TIMEOUT_S, reason)
    slots.stop()
