"""Chooses how a cluster starts its engines."""

import importlib.util
from collections.abc import Callable

from loraplex.engine.cluster.launch.launcher import Launcher
from loraplex.engine.cluster.launch.process_launcher import ProcessLauncher
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError

NO_RAY = "none"
LOCAL_RAY = "local"


def make_launcher(
    config: EngineConfig,
    *,
    ray_address: str = "",
    on_progress: Callable[[str], None] | None = None,
    worker_command: list[str] | None = None,
) -> Launcher:
    """Returns a launcher that is not open.

    Args:
        ray_address: HOST:PORT of a Ray cluster to join; "local" starts Ray on this machine; "none"
            starts child processes; "" is "local" if Ray is installed, else "none".

    Raises:
        ConfigError: Ray is asked for and not installed.
    """
    is_installed = importlib.util.find_spec("ray") is not None
    if ray_address == NO_RAY or not ray_address and not is_installed:
        return ProcessLauncher(config, on_progress=on_progress, worker_command=worker_command)
    if not is_installed:
        raise ConfigError(
            f"ray_address {ray_address} needs Ray: pip install 'loraplex[cluster]', or leave it "
            "out for engines on this machine alone"
        )
    if "://" in ray_address:
        raise ConfigError(
            f"ray_address {ray_address} must be HOST:PORT: the router's machine has to be a node "
            "of the cluster"
        )
    from loraplex.engine.cluster.launch.ray_launcher import RayLauncher

    return RayLauncher(
        config,
        address=ray_address or LOCAL_RAY,
        on_progress=on_progress,
        worker_command=worker_command,
    )
