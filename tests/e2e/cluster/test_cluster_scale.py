"""A cluster starts an engine under load and releases it when idle; streams notice nothing."""

import threading
from pathlib import Path

import pytest

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.cli import main as cli
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import fake_config
from helpers.running.cluster_streams import fake_cluster, stream_many
from helpers.running.processes import wait_until

pytestmark = pytest.mark.e2e


def test_engines_come_with_load_and_go_with_it(tmp_path: Path) -> None:
    options = {"num_engines": 1, "max_engines": 2, "ray_address": NO_RAY, "scale_hold_s": 1.0}
    with fake_cluster(tmp_path, **options) as cluster:
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                stream_many(cluster)

        thread = threading.Thread(target=load)
        thread.start()
        wait_until(lambda: len(cluster.engines) == 2 or not thread.is_alive())
        done.set()
        thread.join()
        stream_many(cluster)
        wait_until(lambda: len(cluster.engines) == 1)
        stream_many(cluster)
        with Client(cluster.endpoint) as client:
            router = client.stats()["router"]
        assert router["scale"]["released"] >= 1 and router["scale"]["failed"] == 0
        assert router["lost_engines"] == 0


def test_bounds_that_make_no_sense_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"the most engines \(1\) are fewer than the fewest \(2\)"
    ):
        EngineCluster(fake_config(), num_engines=2, max_engines=1)
    for flags in ([], ["--engines", "1", "--min-engines", "1"], ["--max-engines", "2"]):
        assert cli.main(["cluster", *flags]) == 2
        assert "give --engines N, or --min-engines A and --max-engines B" in capsys.readouterr().err
