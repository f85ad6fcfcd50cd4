"""Kills an engine of a cluster under load."""

import os
import signal
import threading

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.errors import LoraplexError
from loraplex.entrypoints.client.sync_client import Client

LOOK_S = 0.05


class EngineStrike:
    """Kills the busiest engine once `num_running` requests run; a context manager."""

    def __init__(self, cluster: EngineCluster, num_running: int) -> None:
        self._cluster = cluster
        self._num_running = num_running
        self._killed = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine strike", daemon=True)

    def __enter__(self) -> "EngineStrike":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def killed(self) -> str:
        """Name of the engine that was killed.

        Raises LoraplexError if none was, as the requests ended before so many ran.
        """
        if not self._killed:
            raise LoraplexError(
                f"no engine was killed: {self._num_running} requests never ran at one time"
            )
        return self._killed

    def _run(self) -> None:
        with Client(self._cluster.endpoint) as client:
            while not self._stopping.wait(LOOK_S):
                engines = client.stats()["router"]["engines"]
                running = {name: row.get("running", 0) for name, row in engines.items()}
                if running and sum(running.values()) >= self._num_running:
                    busiest = max(running, key=lambda name: running[name])
                    os.kill(self._cluster.engines[busiest].pids["scheduler"], signal.SIGKILL)
                    self._killed = busiest
                    return
