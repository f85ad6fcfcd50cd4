"""One engine's place in a Ray cluster: a placement group, and an actor that Ray restarts in it."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from loraplex.engine.cluster.launch.engine_actor import THREADS_VARIABLE, EngineActor
from loraplex.engine.errors import ConfigError, EngineDeadError

PLACE_TIMEOUT_S = 120.0
LOOK_S = 0.5
CALLS_AT_ONCE = 4  # start, wait and stop of the actor may overlap


class RayPlace:
    """Reserves the devices of one engine, which are all on one node."""

    def __init__(
        self,
        index: int,
        devices: dict[str, float],
        on_progress: Callable[[str], None] | None,
        timeout_s: float = PLACE_TIMEOUT_S,
    ) -> None:
        """Makes a place that reserves nothing yet.

        Args:
            devices: Ray's names and numbers of what one engine needs.
            timeout_s: for Ray, or its autoscaler, to find them.
        """
        self._index = index
        self._devices = devices
        self._on_progress = on_progress
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._group: Any = None
        self._actor: Any = None
        self._is_released = False

    def actor(self) -> Any:
        """Returns the handle of the engine's actor; waits for a place the first time.

        Raises:
            ConfigError: Ray has found no place in time; the text says what it has.
            EngineDeadError: the place was released meanwhile.
        """
        with self._lock:
            if self._group is None:
                self._group = self._make_group(time.monotonic() + self._timeout_s)
            if self._actor is None:
                self._actor = self._make_actor()
            return self._actor

    def forget_actor(self) -> None:
        """Lets actor() make another one: Ray has given this one up."""
        with self._lock:
            self._actor = None

    def release(self) -> None:
        """Ends the actor and gives the devices back."""
        self._is_released = True
        if not ray.is_initialized():  # any call would start another Ray
            return
        with self._lock, contextlib.suppress(RayError, ValueError):
            if self._actor is not None:
                ray.kill(self._actor, no_restart=True)
            if self._group is not None:
                remove_placement_group(self._group)
            self._actor = self._group = None

    def _make_group(self, deadline: float) -> Any:
        group = placement_group([self._devices])
        try:
            self._await_group(group, deadline)
        except BaseException:
            remove_placement_group(group)
            raise
        return group

    def _await_group(self, group: Any, deadline: float) -> None:
        is_told = False
        while not group.wait(LOOK_S):
            if self._is_released:
                raise EngineDeadError("the cluster was stopped")
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"engine {self._index} needs {in_words(self._devices)} of one node, and Ray "
                    f"has not found them within {self._timeout_s:g} s. The cluster has "
                    f"{in_words(ray.cluster_resources())}, of which "
                    f"{in_words(ray.available_resources())} are free: ask for fewer engines, or "
                    "add nodes"
                )
            if not is_told and self._on_progress is not None:
                self._on_progress(f"engine {self._index}: waits for {in_words(self._devices)}")
                is_told = True

    def _make_actor(self) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)
        options = {
            "num_cpus": self._devices.get("CPU", 0),
            "num_gpus": self._devices.get("GPU", 0),
            "scheduling_strategy": strategy,
            "max_restarts": -1,
            "max_concurrency": CALLS_AT_ONCE,
        }
        return ray.remote(EngineActor).options(**options).remote(os.environ.get(THREADS_VARIABLE))


def in_words(resources: dict[str, float]) -> str:
    """Returns "2 GPUs and 8 CPUs" for Ray's numbers; other resources are left out."""
    texts = [
        f"{resources.get(kind, 0):g} {kind}{'' if resources.get(kind, 0) == 1 else 's'}"
        for kind in ("GPU", "CPU")
        if kind in resources
    ]
    return " and ".join(texts)
