"""Starts, watches and stops the processes of one engine."""

import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType

from loraplex.engine.adapters.paths import adapters_at_start
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.frontend.client_socket import check_server_config
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.process_group import ProcessGroup, engine_processes

STOP_TIMEOUT_S = 10.0


class Engine:
    """The processes of one engine: frontend, scheduler, workers.

    A process that ends by itself takes the engine down: waiting clients get its reason, the
    others are stopped, `wait()` returns 1. Nothing outlives this object, this process, or a
    kill -9 of this process. Usable from any thread and without a main guard.

    Attributes (once started):
        endpoint: where clients connect: the configured one, or a private ipc:// if that is "".
        info: the model's limits and what the workers run.
    """

    endpoint: str
    info: EngineInfo

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None] | None = None,
        worker_command: list[str] | None = None,
    ) -> None:
        """`on_progress` gets a line now and then while the engine starts, from another thread;
        `worker_command` replaces ``python -m loraplex.engine.processes.worker_main``."""
        self._config = config
        self._worker_command = worker_command
        self._interrupted = False
        self._group = ProcessGroup(on_progress)

    @property
    def dead_reason(self) -> str | None:
        """Which process died and how; None while alive, or when stopped on purpose."""
        culprit = self._group.culprit
        return culprit.how_it_ended() if culprit is not None else None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: "worker 0", "scheduler", "frontend 0"."""
        return {process.spec.name: process.popen.pid for process in self._group.processes}

    def start(self, timeout_s: float = 600.0) -> None:
        """Start every process and wait until all are ready.

        Raises ConfigError (the text says what to change) or EngineDeadError; nothing is left
        running then.
        """
        check_server_config(self._config.server)
        adapters_at_start(self._config.adapter)
        try:
            self._group.start(engine_processes(self._config, self._worker_command), self._config)
            weakref.finalize(self, self._group.stop, STOP_TIMEOUT_S)
            self._await_ready(time.monotonic() + timeout_s)
        except BaseException:
            self.stop()
            raise
        (scheduler,) = self._group.of_kind("scheduler")
        (frontend,) = self._group.of_kind("frontend")
        assert scheduler.ready is not None and scheduler.ready.info is not None
        assert frontend.ready is not None
        self.info = scheduler.ready.info
        self.endpoint = frontend.ready.endpoint

    def _await_ready(self, deadline: float) -> None:
        group = self._group
        with group.changed:
            while not group.is_ready and group.culprit is None and not self._interrupted:
                if not group.changed.wait(min(1.0, deadline - time.monotonic())) and (
                    time.monotonic() >= deadline
                ):
                    late = [p.spec.name for p in group.processes if p.ready is None]
                    raise EngineDeadError(f"{', '.join(late)} did not get ready in time")
        if self._interrupted:
            raise EngineDeadError("interrupted while starting")
        culprit = group.culprit
        if culprit is not None:
            if culprit.failed is not None and culprit.failed.code == ConfigError.code:
                raise ConfigError(culprit.failed.text)
            raise EngineDeadError(culprit.how_it_ended())

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Block until stop() (0) or death (1); None when `timeout_s` passes first."""
        if not self._group.ended.wait(timeout_s):
            return None
        return 1 if self._group.culprit is not None else 0

    def serve(self, on_ready: "Callable[[Engine], None] | None" = None) -> int:
        """start(), call `on_ready`, then wait until SIGINT or SIGTERM (a clean stop, 0) or a
        death (1). A second signal kills at once.

        For the main thread of a server; the former signal handlers are put back at the end.
        """

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                self._group.kill()
            self._interrupted = True
            wake.set()

        wake = threading.Event()
        numbers = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            self.start()
            if on_ready is not None:
                on_ready(self)
            while not self._interrupted and not self._group.ended.is_set():
                wake.wait(0.5)
            self.stop()
        except EngineDeadError:
            if not self._interrupted:
                raise
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return 1 if self._group.culprit is not None else 0

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End every process: frontends first, then SIGTERM, after `timeout_s` SIGKILL; remove
        the run directory. Idempotent; returns when nothing is left."""
        self._group.stop(timeout_s)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
