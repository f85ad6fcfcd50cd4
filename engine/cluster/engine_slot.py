"""One engine's place in a cluster: starts an engine there, and another one when it ends."""

import logging
import threading
import time
from collections.abc import Callable

from loraplex.engine.cluster.engine_list import ListedEngine
from loraplex.engine.cluster.launch.launcher import EngineHandle, Launcher
from loraplex.engine.errors import EngineDeadError, LoraplexError
from loraplex.engine.processes.restart_policy import RestartPolicy

logger = logging.getLogger("loraplex.cluster")


class EngineSlot:
    """Keeps one engine running until stop().

    Attributes:
        engine: the engine that is up, None while there is none.
        is_draining: that engine gets no more requests.
        num_starts: engines of this place that came up.
        failure: why no engine runs here any more.
    """

    def __init__(self, index: int, launcher: Launcher, on_change: Callable[[], None]) -> None:
        """`on_change` is called in another thread when an engine has come or gone."""
        self.index = index
        self.engine: EngineHandle | None = None
        self.is_draining = False
        self.num_starts = 0
        self.failure: Exception | None = None
        self._launcher = launcher
        self._on_change = on_change
        self._latest: EngineHandle | None = None  # started last; it may not be up
        self._started = threading.Event()  # the first start has succeeded or failed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"engine {index}", daemon=True)

    @property
    def engine_id(self) -> str:
        """Name of the present engine; each start gets another one."""
        return f"engine-{self.index}.{self.num_starts}"

    @property
    def listed(self) -> ListedEngine | None:
        """The present engine, as routers need it."""
        engine = self.engine
        if engine is None:
            return None
        return ListedEngine(self.engine_id, engine.scheduler_endpoint, self.is_draining)

    def start(self) -> None:
        """Begins to start the first engine."""
        self._thread.start()

    def await_start(self, deadline: float) -> None:
        """Waits until the first engine is up, until `deadline` of time.monotonic().

        Raises:
            ConfigError: it cannot start as configured.
            EngineDeadError: it ended or was not ready in time.
        """
        self._started.wait(max(0.0, deadline - time.monotonic()))
        if self.failure is not None:
            raise self.failure
        if self.engine is None:
            raise EngineDeadError(f"engine {self.index} did not get ready in time")

    def retire(self) -> None:
        """Lets routers empty the engine; no other is started when it ends."""
        self._stopping.set()
        self.is_draining = True
        self._on_change()

    def stop(self) -> None:
        """Ends the engine and starts no other. Idempotent; waits until it is gone."""
        self._stopping.set()
        if self._latest is not None:
            self._latest.stop()

    def _keep(self) -> None:
        """Run one engine after the other."""
        restarts = RestartPolicy()
        while not self._stopping.is_set():
            engine = self._start_engine()
            if engine is not None:
                engine.wait()
                self.engine = None
                if self._stopping.is_set():
                    self._on_change()
                    return
                logger.warning("%s has ended: %s", self.engine_id, engine.dead_reason)
                self._on_change()
            elif self.failure is not None:
                return  # await_start() raises it
            delay_s = restarts.on_death(time.monotonic())
            if delay_s is None:
                self.failure = EngineDeadError("it ends too often and is not started again")
                logger.error("engine %d: %s", self.index, self.failure)
                return
            self._stopping.wait(delay_s)

    def _start_engine(self) -> EngineHandle | None:
        try:
            engine = self._latest = self._launcher.make_engine(self.index)
            if self._stopping.is_set():  # stop() has not seen this one
                return None
            engine.start()
        except (LoraplexError, OSError) as error:
            if not self._started.is_set():
                self.failure = error
                self._started.set()
            if not self._stopping.is_set():
                logger.warning("engine %d cannot start: %s", self.index, error)
            return None
        self.num_starts += 1
        self.engine, self.is_draining = engine, False
        self._started.set()
        if self._stopping.is_set():
            engine.stop()
        self._on_change()
        return engine
