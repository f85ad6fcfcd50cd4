"""Starts, supervises and stops the processes of one engine."""

import time
import weakref
from collections.abc import Callable
from contextlib import closing
from functools import partial

from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.frontend.client_socket import check_client_keys, check_server_config
from loraplex.engine.frontend.mixing.named_mixes import check_adapter_config
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.kv_events.kv_events_config import kv_events_config
from loraplex.engine.processes.addresses.http_address import check_http_config
from loraplex.engine.processes.draining.drain import drain
from loraplex.engine.processes.draining.stop_signals import StopSignals
from loraplex.engine.processes.launch.engine_processes import engine_processes
from loraplex.engine.processes.process import Environment
from loraplex.engine.processes.process_group import ProcessGroup
from loraplex.engine.stores.open_stores import check_stores
from loraplex.engine.tenants.hangup_reload import HangupReload
from loraplex.engine.tenants.key_file import read_tenants_of

STOP_TIMEOUT_S = 10.0


class Engine:
    """The processes of one engine: frontends, scheduler, workers.

    A scheduler or a worker that ends by itself ends the engine: waiting clients get the reason, all
    processes are stopped, and `wait()` returns 1. A frontend that ends is started again at the same
    address, up to a number of times a minute; its clients lose their requests and may go on.
    Nothing outlives this object, this process, or a kill -9 of this process. Usable from any thread
    and without a main guard.

    Attributes (once started):
        endpoint: the address for clients: the configured one, or a private ipc:// if that is "".
        http_endpoint: HOST:PORT of the HTTP server, "" if there is none.
        info: the limits of the model, and the devices and backends of the workers.
    """

    endpoint: str
    http_endpoint: str = ""
    info: EngineInfo

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None] | None = None,
        on_status: Callable[[str], None] | None = None,
        worker_command: list[str] | None = None,
        environment: Environment = (),
        scheduler_host: str = "",
        folder_server: str = "",
    ) -> None:
        """Makes an engine that is not started.

        Args:
            on_progress: takes lines about the start; called from other threads.
            on_status: takes a line now and then while the engine is busy; called from another
                thread, which must not be held up.
            worker_command: replaces ``python -m loraplex.engine.processes.worker_main``.
            environment: variables of the workers besides this process's.
            scheduler_host: address of this machine at which routers on other machines reach the
                scheduler, without encryption; "": they are all on this one.
            folder_server: socket where copies of adapters from another machine are asked for; ""
                means that all adapters are here.
        """
        self._config = config
        self._specs = partial(
            engine_processes,
            config,
            worker_command,
            environment,
            scheduler_host=scheduler_host,
            folder_server=folder_server,
        )
        self._has_adapters = not folder_server
        self._has_model = worker_command is None
        self._interrupted = False
        self._group = ProcessGroup(on_progress, on_status)

    @property
    def dead_reason(self) -> str | None:
        """Which process ended the engine and how; None while it lives or was stopped."""
        return self._group.dead_reason or None

    @property
    def pids(self) -> dict[str, int]:
        """The id of each current process by its name: "worker 0", "scheduler", "frontend 0"."""
        return {process.spec.name: process.popen.pid for process in self._group.processes}

    @property
    def scheduler_endpoint(self) -> str:
        """The address that routers connect to."""
        (scheduler,) = self._group.of_kind("scheduler")
        return scheduler.endpoint or f"ipc://{self._group.run_dir}/frontends"

    def start(self, timeout_s: float = 600.0) -> None:
        """Start every process and wait until all are ready.

        Raises:
            ConfigError: the engine cannot start as configured; the text says what to change.
            EngineDeadError: a process ended or was not ready in time. Nothing is left running.
        """
        check_server_config(self._config.server)
        check_http_config(self._config.server)
        if self._has_adapters:
            check_adapter_config(self._config.adapter)
            check_stores(self._config)
        kv_events_config(self._config.server)
        self._group.tenants = read_tenants_of(self._config.server)
        if self._has_model:
            resolve_model(self._config.model.model)  # before any process loads its libraries
        try:
            self._group.start(self._specs(), self._config)
            weakref.finalize(self, self._group.stop, STOP_TIMEOUT_S)
            self._await_ready(time.monotonic() + timeout_s)
        except BaseException:
            self.stop()
            raise
        (scheduler,) = self._group.of_kind("scheduler")
        frontend, *_ = self._group.of_kind("frontend")
        assert scheduler.ready is not None and scheduler.ready.info is not None
        assert frontend.ready is not None
        self.info = scheduler.ready.info
        self.endpoint = frontend.ready.endpoint
        for http in self._group.of_kind("http"):
            self.http_endpoint = http.endpoint
        self._group.allow_restarts()

    def _await_ready(self, deadline: float) -> None:
        group = self._group
        with group.changed:
            while not group.is_ready and not group.dead_reason and not self._interrupted:
                if not group.changed.wait(min(1.0, deadline - time.monotonic())) and (
                    time.monotonic() >= deadline
                ):
                    late = [p.spec.name for p in group.processes if p.ready is None]
                    raise EngineDeadError(f"{', '.join(late)} did not get ready in time")
        if self._interrupted:
            raise EngineDeadError("interrupted while starting")
        if group.dead_process is not None:
            failed = group.dead_process.failed
            if failed is not None and failed.code == ConfigError.code:
                raise ConfigError(failed.text)
            raise EngineDeadError(group.dead_reason)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Block until the engine ends. Returns 0 after stop(), 1 after a death, None at timeout."""
        if not self._group.ended.wait(timeout_s):
            return None
        return 1 if self._group.dead_reason else 0

    def serve(self, on_ready: "Callable[[Engine], None] | None" = None) -> int:
        """Start, call `on_ready`, and wait. Returns 0 after SIGINT or SIGTERM, 1 after a death.

        After the first signal the requests of clients may end as `drain_grace` and `drain_timeout`
        say. A second signal kills all processes at once. SIGHUP reads the clients' keys again,
        where the server asks for them. Call it from the main thread of a server.
        """

        def on_signal(count: int) -> None:
            self._interrupted = True
            if count > 1:
                self._group.kill()

        reason = ""
        reload = self.reload_keys if self._config.server.has_keys else None
        with StopSignals(on_signal) as signals, closing(HangupReload(reload)) as hangup:
            try:
                self.start()
                if on_ready is not None:
                    on_ready(self)
                while not signals.count and not self._group.ended.is_set():
                    signals.wait(0.5)
                    hangup.run_pending()
                if signals.count:
                    reason = drain(self._group, self._config.server, signals)
                self._group.stop(STOP_TIMEOUT_S, reason)
            except EngineDeadError:
                if not self._interrupted:
                    raise
        return 1 if self._group.dead_reason else 0

    def reload_keys(self) -> None:
        """Read `api_keys` and `client_public_keys_dir` again. Requests that run go on.

        Raises:
            ConfigError: a file is not as it must be; the old keys stay.
        """
        check_client_keys(self._config.server)
        self._group.set_tenants(read_tenants_of(self._config.server))

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End every process and remove the run directory. Idempotent; waits until all are gone.

        Frontends end first. The others get SIGTERM, and SIGKILL after `timeout_s`.
        """
        self._group.stop(timeout_s)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
