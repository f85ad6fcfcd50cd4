"""Starts engines as child processes, on the devices of this machine."""

import os
from collections.abc import Callable

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.processes.engine import Engine
from loraplex.engine.processes.process import Environment

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"


def device_environment(index: int, num_devices: int) -> Environment:
    """Returns the variables that give engine `index` its own `num_devices` GPUs.

    Raises ConfigError if the caller sees fewer GPUs than that engine needs.
    """
    first = index * num_devices
    visible = os.environ.get(DEVICES_VARIABLE)
    names = [str(i) for i in range(first + num_devices)] if visible is None else visible.split(",")
    mine = names[first : first + num_devices]
    if visible and len(mine) < num_devices:
        raise ConfigError(
            f"engine {index} needs GPUs {first} to {first + num_devices - 1} of the "
            f"{len(names)} in {DEVICES_VARIABLE}: ask for fewer engines"
        )
    return ((DEVICES_VARIABLE, ",".join(mine)),)


class ProcessLauncher:
    """Gives each place its own GPUs of this machine. On a CPU the engines share the cores."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None] | None = None,
        worker_command: list[str] | None = None,
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._worker_command = worker_command

    def open(self, num_engines: int) -> None:
        """Raises ConfigError if CUDA_VISIBLE_DEVICES names too few GPUs."""
        device_environment(num_engines - 1, self._config.parallel.tensor_parallel_size)

    def make_engine(self, index: int) -> Engine:
        return Engine(
            self._config,
            on_progress=self._on_progress,
            worker_command=self._worker_command,
            environment=device_environment(index, self._config.parallel.tensor_parallel_size),
        )

    def release(self, index: int) -> None:
        """Does nothing: the devices are free once the engine has ended."""

    def close(self) -> None:
        """Does nothing."""

    def describe(self) -> str:
        return "child processes of this one"
