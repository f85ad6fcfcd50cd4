"""Engines on other nodes of a Ray cluster, one of which dies. The nodes are all on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.errors import ConfigError

from helpers.fakes.fake_engine import fake_config
from helpers.running.cluster_streams import fake_cluster, stream_many
from helpers.running.processes import wait_until

cluster_utils = pytest.importorskip("ray.cluster_utils")
ray_launcher = pytest.importorskip("loraplex.engine.cluster.launch.ray_launcher")
pytestmark = [pytest.mark.e2e, pytest.mark.long]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Three nodes: the router's has no CPUs, the engines' one each."""
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineCluster]:
    root: Path = tmp_path_factory.mktemp("adapters")
    with fake_cluster(root, num_engines=2, ray_address=nodes.address) as cluster:
        yield cluster


def test_streams_end_complete_when_a_node_dies(nodes: Any, cluster: EngineCluster) -> None:
    assert all(e.scheduler_endpoint.startswith("tcp://") for e in cluster.engines.values())
    former = set(cluster.engines)
    stream_many(cluster)
    nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
    stream_many(cluster)
    wait_until(lambda: len(cluster.engines) == 1)
    nodes.add_node(num_cpus=1)
    wait_until(lambda: len(cluster.engines) == 2)
    assert len(former & set(cluster.engines)) == 1
    stream_many(cluster)


def test_too_few_cpus_are_named(nodes: Any, cluster: EngineCluster) -> None:
    launcher = ray_launcher.RayLauncher(fake_config(), address=nodes.address, place_timeout_s=1.0)
    launcher.open(3)
    with pytest.raises(ConfigError, match=r"engine 2 needs 1 CPU of one node.* has 2 CPUs"):
        launcher.make_engine(2).start()
    launcher.close()
