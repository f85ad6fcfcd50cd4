"""Several engines behind one endpoint: streams go on when an engine or the router dies."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engine.adapters.paths import WEIGHTS_FILE
from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.files.adapter_files import PIECE_BYTES
from loraplex.engine.cluster.files.files_actor import FilesActor
from loraplex.engine.cluster.files.node_files import NodeFiles
from loraplex.engine.cluster.files.ray_source import RaySource
from loraplex.engine.cluster.launch.launchers import LOCAL_RAY, NO_RAY
from loraplex.engine.errors import AdapterError, ConfigError
from loraplex.engine.stores.disk_cache import DiskCache
from loraplex.entrypoints.cli import main as cli
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import fake_config, make_fake_adapter
from helpers.running.cluster_streams import fake_cluster, stream, stream_many
from helpers.running.processes import is_alive, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=[NO_RAY, LOCAL_RAY])
def cluster(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[EngineCluster]:
    if request.param == LOCAL_RAY:
        pytest.importorskip("ray")
    root = tmp_path_factory.mktemp("adapters")
    with fake_cluster(root, num_engines=2, ray_address=request.param) as cluster:
        yield cluster
        pids = [pid for engine in cluster.engines.values() for pid in engine.pids.values()]
        pids.append(cluster.router_pid)
    wait_until(lambda: not any(map(is_alive, pids)))


def test_streams_end_complete_when_an_engine_is_killed(cluster: EngineCluster) -> None:
    victim, engine = next(iter(cluster.engines.items()))
    pid = engine.pids.get(
        "actor", engine.pids["scheduler"]
    )  # Ray restarts an actor that was killed
    stream_many(cluster, threading.Thread(target=os.kill, args=(pid, signal.SIGKILL)))
    wait_until(lambda: len(cluster.engines) == 2 and victim not in cluster.engines)
    stream_many(cluster)  # the new engine knows the adapters
    with Client(cluster.endpoint) as client:
        assert client.stats()["router"]["moves"] > 0
        wait_until(lambda: len(client.stats()["engines"]) == 2)
        (adapter,) = client.list_adapters("a1")
        assert adapter["state"] == "ready"


def test_streams_end_complete_when_an_engine_is_drained(cluster: EngineCluster) -> None:
    engine_id = next(iter(cluster.engines))
    stream_many(cluster, threading.Thread(target=cluster.drain, args=(engine_id,)))
    with Client(cluster.endpoint) as client:
        stats = client.stats()
        assert stats["engines"][engine_id]["running"] == 0
        assert stats["router"]["unfinished"] == 0


def test_status_shows_engines_load_and_moves(
    cluster: EngineCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    stream(cluster.endpoint, 1)
    assert cli.main(["cluster", "status", "--endpoint", cluster.endpoint, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert set(status["engines"]) == set(cluster.engines)
    states = sorted(engine["state"] for engine in status["engines"].values())
    assert states == ["draining", "up"]  # the test before has drained one
    assert sum(engine["adapters"] for engine in status["engines"].values()) >= 1
    assert status["moves"] > 0 and status["lost_engines"] == 1
    assert cli.main(["cluster", "status", "--endpoint", cluster.endpoint]) == 0
    header, *rows, router = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["engine", "state", "running"]
    assert [row.split()[0] for row in rows] == sorted(cluster.engines)
    assert f"{status['moves']} moved" in router


def test_a_router_that_dies_comes_back_and_finds_its_engines(cluster: EngineCluster) -> None:
    pid = cluster.router_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cluster.router_pid != pid)
    with Client(cluster.endpoint) as client:
        wait_until(lambda: bool(client.stats()["engines"]))
    stream(cluster.endpoint, 0)


def test_files_pass_through_rays_object_store(cluster: EngineCluster, tmp_path: Path) -> None:
    """The path means another folder in each process, as on nodes that share no file system."""
    if "actor" not in next(iter(cluster.engines.values())).pids:
        pytest.skip("these engines are child processes")
    ray = pytest.importorskip("ray")

    class MovedFiles(FilesActor):
        def __init__(self, folder: str) -> None:
            os.chdir(folder)
            super().__init__(())

    path, weights = "/proc/self/cwd/a", os.urandom(2 * PIECE_BYTES + 5)
    make_fake_adapter(tmp_path / "a", "{}").joinpath(WEIGHTS_FILE).write_bytes(weights)
    actor = ray.remote(MovedFiles).options(num_cpus=0).remote(str(tmp_path))
    source = RaySource(actor)
    files = NodeFiles(source, DiskCache(tmp_path / "copies", 64 << 20))
    copy = files.open(path)
    assert copy is not None and (copy.path / WEIGHTS_FILE).read_bytes() == weights
    with pytest.raises(AdapterError, match="/proc/self/cwd/b cannot be read on the router's node"):
        files.open("/proc/self/cwd/b")
    ray.kill(actor)
    with pytest.raises(OSError, match="the router's node cannot be asked"):
        files.open(path)


def test_what_a_cluster_cannot_do_is_named() -> None:
    with pytest.raises(ConfigError, match="at least 1 engine"):
        EngineCluster(fake_config(), num_engines=0)
    with pytest.raises(ConfigError, match="placement must be one of"):
        EngineCluster(fake_config(), num_engines=1, placement="best")
