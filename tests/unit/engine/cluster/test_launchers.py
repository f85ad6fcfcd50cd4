"""Which launcher a cluster gets, and the errors that say what to change."""

import importlib.util
import socket

import pytest

from loraplex.engine.cluster.launch.launchers import LOCAL_RAY, NO_RAY, make_launcher
from loraplex.engine.cluster.launch.process_launcher import ProcessLauncher, device_environment
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_child_processes_serve_where_ray_is_not_installed(without_ray: None) -> None:
    assert isinstance(make_launcher(EngineConfig()), ProcessLauncher)
    with pytest.raises(ConfigError, match=r"needs Ray: pip install 'loraplex\[cluster\]'"):
        make_launcher(EngineConfig(), ray_address=LOCAL_RAY)


def test_ray_serves_where_it_is_installed_unless_told_otherwise() -> None:
    pytest.importorskip("ray")
    assert not isinstance(make_launcher(EngineConfig()), ProcessLauncher)
    assert isinstance(make_launcher(EngineConfig(), ray_address=NO_RAY), ProcessLauncher)


def test_ray_addresses_that_cannot_be_joined_are_named() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        make_launcher(EngineConfig(), ray_address="ray://head:10001")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "head"):
        launcher = make_launcher(EngineConfig(), ray_address=address)
        with pytest.raises(ConfigError, match=f"cannot join Ray at {address}.*ray start --head"):
            launcher.open(2)


def test_devices_are_dealt_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_environment(1, 2) == (("CUDA_VISIBLE_DEVICES", "2,3"),)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert device_environment(0, 2) == (("CUDA_VISIBLE_DEVICES", "4,6"),)
    with pytest.raises(ConfigError, match="engine 1 needs GPUs 2 to 3 of the 3"):
        device_environment(1, 2)


def test_a_ray_that_a_busy_machine_starts_too_late_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    starts = []

    def init(**options: object) -> None:
        starts.append(options["address"])
        raise RuntimeError(f"The current node {text}.")

    monkeypatch.setattr(ray, "init", init)
    for text, num_starts in (("timed out during startup", 3), ("has no disk", 1)):
        starts.clear()
        with pytest.raises(ConfigError, match=f"cannot start Ray: The current node {text}"):
            make_launcher(EngineConfig(), ray_address=LOCAL_RAY).open(1)
        assert starts == [LOCAL_RAY] * num_starts
