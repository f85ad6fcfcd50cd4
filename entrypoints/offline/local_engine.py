"""Starts an engine for the caller alone, and a client of it."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

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
        self._config = config
        self._adapters: list[dict[str, Any]] | None = None
        self._pid = os.getpid()
        self._engine: Engine | None = None
        if in_process:
            self._start(partial(self._start_in_process, config), on_progress)
        else:
            self._start(partial(self._start_processes, config), on_progress)

    @property
    def is_sleeping(self) -> bool:
        """Whether `sleep` has stopped the processes."""
        return self._adapters is not None

    def sleep(self) -> None:
        """Stops the processes, which frees all memory, and remembers the adapters.

        Raises ValueError in one process: its memory would stay.
        """
        if self.is_sleeping:
            return
        if self._engine is None:
            raise ValueError("an engine with in_process=True cannot sleep: leave in_process out")
        adapters = [row for row in self.client.list_adapters() if row["path"]]
        self.close()
        self._adapters = adapters

    def wake_up(self) -> None:
        """Starts the processes again, with the adapters that were known, pinned as they were.

        `client` and `info` are new then.
        """
        if self._adapters is None:
            return
        self._start(partial(self._start_processes, self._config), None)
        adapters, self._adapters = self._adapters, None
        for row in adapters:
            self.client.load_adapter(row["name"], row["path"], lazy=True)
            if row["pinned"]:
                self.client.pin_adapter(row["name"])

    @staticmethod
    def _start(
        start: Callable[[Callable[[str], None]], None], on_progress: Callable[[str], None] | None
    ) -> None:
        line = ProgressLine(terminal_only=True)
        try:
            start(on_progress or line)
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
