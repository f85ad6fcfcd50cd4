"""`Cluster`: several engines behind one endpoint, from Python."""

import os
import weakref
from dataclasses import replace
from typing import Any, Unpack

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.offline.options import LLMOptions, engine_config_of


class Cluster:
    """Starts engines and a router; a context manager that ends them.

        with Cluster("path/to/model", num_engines=2) as cluster:
            for output in cluster.client.generate("Hello", adapter="pirate"):
                print(output.outputs[0].text)

    Attributes:
        endpoint: the address that any client of this machine may connect to.
        http_endpoint: HOST:PORT of the HTTP server, "" if there is none.
        client: a client of the cluster.
    """

    def __init__(
        self,
        model: str = "",
        *,
        num_engines: int,
        max_engines: int | None = None,
        placement: str = "affinity",
        endpoint: str = "",
        http: str = "",
        ray_address: str = "",
        **options: Unpack[LLMOptions],
    ) -> None:
        """Starts the cluster and waits until it is ready.

        Args:
            num_engines: that start, and the fewest. Each has GPUs of its own,
                `tensor_parallel_size` of them.
            max_engines: the most, which start under load; None: always `num_engines`.
            placement: "affinity", "consolidate", "least_loaded" or "random".
            endpoint: tcp://HOST:PORT or ipc://PATH; "" is private to this user.
            http: HOST:PORT of the OpenAI-compatible HTTP server; "" is none.
            ray_address: HOST:PORT of a Ray cluster for the engines; "local" starts Ray on this
                machine; "none" starts child processes; "" is "local" if Ray is installed, else
                "none".
            options: those of `LLM`, for each engine.

        Raises:
            ConfigError: an engine cannot start as configured; the text says what to change.
            EngineDeadError: a process ended while it started.
        """
        config = engine_config_of(os.fspath(model), options)
        config = replace(config, server=replace(config.server, endpoint=endpoint, http=http))
        self._cluster = EngineCluster(
            config,
            num_engines=num_engines,
            max_engines=max_engines,
            placement=placement,
            ray_address=ray_address,
        )
        self._cluster.start()
        self._finalizer = weakref.finalize(self, self._cluster.stop)
        self.endpoint = self._cluster.endpoint
        self.http_endpoint = self._cluster.http_endpoint
        self.client = Client(self.endpoint)

    @property
    def engine_ids(self) -> list[str]:
        """Names of the engines that are up."""
        return list(self._cluster.engines)

    @property
    def pids(self) -> list[dict[str, int]]:
        """The process ids of each engine that is up, by the process's name."""
        return [engine.pids for engine in self._cluster.engines.values()]

    def status(self) -> dict[str, Any]:
        """Returns the engines with their load, and what the router has placed and moved.

        The keys are those of `loraplex cluster status --json`; docs/design/cluster.md lists them.
        """
        status: dict[str, Any] = self.client.stats()["router"]
        return status

    def drain(self, engine_id: str) -> None:
        """Moves an engine's requests to the others; it gets no more. KeyError if it is unknown."""
        self._cluster.drain(engine_id)

    def close(self) -> None:
        """Ends all engines. Unfinished requests fail. Calling again does nothing."""
        self.client.close()
        self._finalizer()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
