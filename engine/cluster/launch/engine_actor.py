"""Runs an engine inside a process of Ray."""

import os
import threading
from dataclasses import dataclass

from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.engine import Engine

THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """Tells the cluster about an engine that is up."""

    info: EngineInfo
    scheduler_endpoint: str
    pids: dict[str, int]


class EngineActor:
    """Starts the engine's processes as children of the actor's process.

    They end with it, however it ends. Ray calls each method in a thread of its own.
    """

    def __init__(self, omp_threads: str | None) -> None:
        """`omp_threads` is the caller's OMP_NUM_THREADS.

        Ray sets the variable to the CPUs that an actor reserves. Engines on one machine share all
        its cores, so it is as in the caller.
        """
        os.environ.pop(THREADS_VARIABLE, None)
        if omp_threads is not None:
            os.environ[THREADS_VARIABLE] = omp_threads
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    def start(
        self, config: EngineConfig, worker_command: list[str] | None, router_node: str
    ) -> StartedEngine:
        """Starts an engine in the place of a former one, and waits until it is ready.

        `router_node` is the id of the router's node. An engine on another node listens on TCP.

        Raises:
            ConfigError: the engine cannot start as configured.
            EngineDeadError: a process ended while it started.
        """
        import ray

        context = ray.get_runtime_context()
        host = "" if context.get_node_id() == router_node else ray.util.get_node_ip_address()
        with self._lock:
            self.stop()
            engine = Engine(config, worker_command=worker_command, scheduler_host=host)
            self._engine = engine
            engine.start()
        pids = {**engine.pids, "actor": os.getpid()}
        return StartedEngine(engine.info, engine.scheduler_endpoint, pids)

    def wait(self) -> str:
        """Blocks until the engine ends; returns how it died, "" if it was stopped."""
        if self._engine is not None:
            self._engine.wait()
        return (self._engine and self._engine.dead_reason) or ""

    def stop(self) -> None:
        """Ends the engine, also one that is starting, and waits until it is gone."""
        if self._engine is not None:
            self._engine.stop()
