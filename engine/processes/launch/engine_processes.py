"""The processes of one engine."""

import sys

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.processes.process import Environment, ProcessSpec

HTTP_MODULE = "loraplex.entrypoints.http.main"


def engine_processes(
    config: EngineConfig,
    worker_command: list[str] | None = None,
    environment: Environment = (),
    *,
    scheduler_host: str = "",
    folder_server: str = "",
) -> list[ProcessSpec]:
    """Returns a scheduler, a worker for each rank, and frontends, for ZeroMQ and HTTP.

    Workers get the variables of `environment` too. The scheduler also listens on TCP at
    `scheduler_host`, if that is given. `folder_server` is that of ChildStart.
    """
    if not sys.executable:
        raise ConfigError("there is no Python executable to start the engine's processes with")

    python = [sys.executable, "-P", "-m"]

    def module(name: str) -> list[str]:
        return [*python, f"loraplex.engine.processes.{name}_main"]

    worker = worker_command or module("worker")
    numbers = range(config.server.num_frontends)
    return [
        *(
            ProcessSpec("worker", rank, worker, environment, folder_server=folder_server)
            for rank in range(config.parallel.tensor_parallel_size)
        ),
        ProcessSpec(
            "scheduler",
            0,
            module("scheduler"),
            host=scheduler_host,
            folder_server=folder_server,
        ),
        *(
            ProcessSpec("frontend", i, module("frontend"), folder_server=folder_server)
            for i in numbers
        ),
        *(ProcessSpec("http", i, [*python, HTTP_MODULE]) for i in numbers if config.server.http),
    ]
