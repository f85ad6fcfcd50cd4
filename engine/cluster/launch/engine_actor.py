"""Runs an engine inside a process of Ray."""

import os
import threading
from dataclasses import dataclass
from typing import Any

from loraplex.engine.cluster.files.node_folders import NodeFolders
from loraplex.engine.cluster.files.ray_source import RaySource
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.engine import Engine
from loraplex.engine.stores.open_stores import adapter_roots

THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """Tells the cluster about an engine that is up."""

    info: EngineInfo
    scheduler_endpoint: str
    pids: dict[str, int]


@dataclass(frozen=True, slots=True)
class RouterNode:
    """The node of the routers, and how engines on others get adapters from it.

    Attributes:
        files: a FilesActor; None: every node has the adapters.
        session: names the folders of copies.
    """

    node_id: str
    session: str
    files: Any = None


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
        self._folders: NodeFolders | None = None

    def start(
        self, config: EngineConfig, worker_command: list[str] | None, router: RouterNode
    ) -> StartedEngine:
        """Starts an engine in the place of a former one, and waits until it is ready.

        An engine on another node than the router's listens on TCP, and asks that node for the
        adapters that its own has not. `config` names real paths there.

        Raises:
            ConfigError: the engine cannot start as configured.
            EngineDeadError: a process ended while it started.
        """
        import ray

        context = ray.get_runtime_context()
        is_away = context.get_node_id() != router.node_id
        host = ray.util.get_node_ip_address() if is_away else ""
        with self._lock:
            self.stop()
            needs_copies = is_away and router.files is not None
            folders = self._folders = _open_folders(config, router) if needs_copies else None
            engine = Engine(
                config,
                worker_command=worker_command,
                scheduler_host=host,
                folder_server=folders.address if folders is not None else "",
            )
            self._engine = engine
            try:
                engine.start()
            except BaseException:
                self._close_folders()
                raise
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
        self._close_folders()

    def _close_folders(self) -> None:
        folders, self._folders = self._folders, None
        if folders is not None:
            folders.close()


def _open_folders(config: EngineConfig, router: RouterNode) -> NodeFolders:
    try:
        return NodeFolders(
            RaySource(router.files),
            session=router.session,
            max_bytes=config.store.adapter_cache_bytes,
            adapter_roots=adapter_roots(config),
        )
    except OSError as error:
        raise ConfigError(f"no folder for copies of adapters can be made: {error}") from None
