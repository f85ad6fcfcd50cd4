"""Starts an engine for the caller alone, and a client of it."""

import os
from collections.abc import Callable
from dataclasses import replace

from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.offline.progress import ProgressLine


class LocalEngine:
    """Starts an engine on a private endpoint and connects to it.

    With `in_process` the same scheduler and worker code runs in this process, without sockets.

    Raises:
        ConfigError: the engine cannot start as configured.
        EngineDeadError: a process ended while starting. After an error no process is left.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        in_process: bool,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        config = replace(config, server=replace(config.server, endpoint=""))
        self._pid = os.getpid()
        self._engine: Engine | None = None
        line = ProgressLine(terminal_only=True)
        try:
            if in_process:
                self._start_in_process(config, on_progress or line)
            else:
                self._start_processes(config, on_progress or line)
        finally:
            line.close()

    def _start_processes(self, config: EngineConfig, on_progress: Callable[[str], None]) -> None:
        engine = Engine(config, on_progress=on_progress)
        engine.start()
        try:
            self.endpoint = engine.endpoint
            self.client = Client(engine.endpoint)
        except BaseException:
            engine.stop()
            raise
        self._engine = engine
        self.info: EngineInfo = engine.info

    def _start_in_process(self, config: EngineConfig, on_progress: Callable[[str], None]) -> None:
        from loraplex.engine.processes.in_process import InProcessEngine  # loads torch

        engine = InProcessEngine(config, on_progress=on_progress)
        self.client = Client(engine)
        self.info = engine.info

    def death(self, wait_s: float = 0.0) -> str | None:
        """Returns which process died and how, None if none dies within `wait_s` seconds."""
        if self._engine is None:
            return None
        if wait_s and self._engine.dead_reason is None:
            self._engine.wait(wait_s)
        return self._engine.dead_reason

    def close(self) -> None:
        """Stops the engine. Does nothing if called again, or from a forked child."""
        if os.getpid() != self._pid:
            return
        self.client.close()
        if self._engine is not None:
            self._engine.stop()
