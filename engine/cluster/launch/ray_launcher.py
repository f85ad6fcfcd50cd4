"""Starts engines as actors of Ray, on the nodes of its cluster."""

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loraplex.engine.adapters.paths import adapters_at_start, expanded
from loraplex.engine.cluster.files.files_actor import FilesActor
from loraplex.engine.cluster.launch.engine_actor import RouterNode
from loraplex.engine.cluster.launch.ray_engine import RayEngine
from loraplex.engine.cluster.launch.ray_place import PLACE_TIMEOUT_S, RayPlace, in_words
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.stores.open_stores import adapter_roots

LOCAL = "local"
OBJECT_STORE_BYTES = 80 << 20  # of a Ray that is started here; little more than Ray's least
REACH_TIMEOUT_S = 5.0
FILE_CALLS_AT_ONCE = 8
START_ATTEMPTS = 3
START_TOO_LATE = "timed out during startup"
"""Ray's error where a busy machine needs more than the 30 s that Ray gives itself."""


class RayLauncher:
    """Joins a Ray cluster, or starts one on this machine.

    A process that is connected with Ray already keeps its connection. Ray starts, restarts and
    places engines; requests and tokens never pass through it.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        address: str,
        on_progress: Callable[[str], None] | None = None,
        worker_command: list[str] | None = None,
        place_timeout_s: float = PLACE_TIMEOUT_S,
    ) -> None:
        """Makes a launcher that is not open.

        Args:
            address: HOST:PORT of a Ray cluster, or LOCAL to start one.
            place_timeout_s: for Ray, or its autoscaler, to find the devices of an engine.
        """
        self._config = config
        self._address = address
        self._on_progress = on_progress
        self._worker_command = worker_command
        self._place_timeout_s = place_timeout_s
        self._lock = threading.Lock()
        self._places: dict[int, RayPlace] = {}
        self._is_own = False  # close() ends the connection
        self._router: RouterNode | None = None

    def open(self, num_engines: int) -> None:
        """Connects. Raises ConfigError if that fails, or if a local Ray has too few GPUs."""
        num_devices = self._config.parallel.tensor_parallel_size
        if not ray.is_initialized():
            self._connect(num_engines * num_devices)
            self._is_own = True
        self._router = self._make_router_node()
        if self._router.files is not None:
            self._config = _with_real_paths(self._config)
        kind = self._device_kind()
        self._devices = {kind: float(num_devices)}
        found = ray.cluster_resources().get(kind, 0)
        if self._address == LOCAL and found < num_engines * num_devices:
            raise ConfigError(
                f"{num_engines} engines need {num_engines * num_devices} {kind}s, and this "
                f"machine has {in_words(ray.cluster_resources())}: ask for fewer engines"
            )

    def _make_router_node(self) -> RouterNode:
        """Starts what hands adapters to other nodes, unless Ray was started for this machine."""
        node_id = ray.get_runtime_context().get_node_id()
        if self._is_own and self._address == LOCAL:
            return RouterNode(node_id, uuid.uuid4().hex)
        options = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_concurrency": FILE_CALLS_AT_ONCE,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        files = ray.remote(FilesActor).options(**options).remote(adapter_roots(self._config))
        return RouterNode(node_id, uuid.uuid4().hex, files)

    def _connect(self, num_cpus: int) -> None:
        options: dict[str, Any] = {"address": self._address}
        if self._address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options |= {
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                # The engines of one machine share its cores, and may be more than these.
                "num_cpus": max(num_cpus, os.cpu_count() or 1),
            }
        else:
            _check_reachable(self._address)
        attempts = START_ATTEMPTS if self._address == LOCAL else 1
        for is_last in [False] * (attempts - 1) + [True]:
            try:
                ray.init(logging_level=logging.ERROR, **options)
                return
            except Exception as error:  # of many kinds: another version, a wrong token, too late
                if not is_last and START_TOO_LATE in str(error):
                    continue
                where = "start Ray" if self._address == LOCAL else f"join Ray at {self._address}"
                raise ConfigError(
                    f"cannot {where}: {error} All nodes need the same versions of Ray and of Python"
                ) from None

    def _device_kind(self) -> str:
        """Returns Ray's name of what the workers run on."""
        device = self._config.model.device
        if device == "auto":
            return "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"
        return "CPU" if device == "cpu" else "GPU"

    def make_engine(self, index: int) -> RayEngine:
        with self._lock:
            if index not in self._places:
                self._places[index] = RayPlace(
                    index, self._devices, self._on_progress, self._place_timeout_s
                )
            place = self._places[index]
        assert self._router is not None, "open() comes first"
        return RayEngine(place, self._config, self._router, self._worker_command)

    def release(self, index: int) -> None:
        """Gives the devices of place `index` back to Ray."""
        with self._lock:
            place = self._places.pop(index, None)
        if place is not None:
            place.release()

    def close(self) -> None:
        for index in list(self._places):
            self.release(index)
        if self._router is not None and self._router.files is not None and ray.is_initialized():
            ray.kill(self._router.files)
        if self._is_own:
            ray.shutdown()
            self._is_own = False

    def describe(self) -> str:
        address = ray.get_runtime_context().gcs_address
        return f"actors of Ray at {address}, {len(ray.nodes())} nodes"


def _with_real_paths(config: EngineConfig) -> EngineConfig:
    """Returns the configuration with the adapters as the router's node sees them."""
    adapter = replace(
        config.adapter,
        adapters=tuple(adapters_at_start(config.adapter)),
        adapter_dir="",
        adapter_root=expanded(config.adapter.adapter_root),
    )
    return replace(config, adapter=adapter)


def _check_reachable(address: str) -> None:
    """Raises ConfigError unless something listens at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"cannot join Ray at {address}: {error}. Give HOST:PORT of a machine where "
            "`ray start --head` has run (its port is 6379 unless told otherwise)"
        ) from None
