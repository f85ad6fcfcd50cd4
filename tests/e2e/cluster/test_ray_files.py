"""An engine on a node that does not see the adapters of the router's node."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.adapters.paths import WEIGHTS_FILE
from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.errors import AdapterError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.store_config import StoreConfig
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import GUARD_S, fake_worker_command, wait_until

cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = [pytest.mark.e2e, pytest.mark.long]
UNSHARE = ["unshare", "--mount", "--propagation", "private"]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A Ray cluster whose only node with a CPU sees an empty folder in place of the adapters."""
    try:
        subprocess.run([*UNSHARE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not hide folders from a process")
    root = tmp_path / "adapters"
    make_fake_adapter(root / "start", "known at start")
    make_fake_adapter(root / "late", "loaded by a client")
    make_fake_adapter(root / "store" / "stored", "in a store").joinpath(WEIGHTS_FILE).touch()
    nodes: Any = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray = f"{sys.executable} -m ray.scripts.scripts"
    join = f"exec {ray} start --block --num-cpus 1 --address {nodes.address}"
    hidden = subprocess.Popen([*UNSHARE, "sh", "-c", f"mount -t tmpfs none {root} && {join}"])
    yield nodes.address
    hidden.terminate()
    hidden.wait(GUARD_S)
    nodes.shutdown()


def test_adapters_reach_an_engine_that_does_not_see_them(address: str, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    config = fake_config(
        adapter=AdapterConfig(adapters=(("start", str(root / "start")),), adapter_root=str(root)),
        store=StoreConfig(adapter_stores=(str(root / "store"),)),
        server=ServerConfig(endpoint=""),
    )
    cluster = EngineCluster(
        config, num_engines=1, ray_address=address, worker_command=fake_worker_command()
    )
    with cluster:
        cluster.start(GUARD_S)
        with Client(cluster.endpoint) as client:
            assert answer(client, "start") == expected_tokens([7], "known at start", max_tokens=9)
            assert answer(client, "stored") == expected_tokens([7], "in a store", max_tokens=9)
            client.load_adapter("late", str(root / "late"))
            assert answer(client, "late") == expected_tokens(
                [7], "loaded by a client", max_tokens=9
            )
            (root / "late" / "adapter_config.json").write_text("trained again")
            client.load_adapter("late", str(root / "late"))
            assert answer(client, "late") == expected_tokens([7], "trained again", max_tokens=9)
            (root / "empty").mkdir()
            with pytest.raises(AdapterError, match="empty"):
                client.load_adapter("empty", str(root / "empty"))
        assert len(folders_of_copies()) == 1
    wait_until(lambda: not folders_of_copies())


def answer(client: Client, adapter: str) -> list[int]:
    *_, last = client.generate([7], SamplingParams(max_tokens=9, temperature=0.0), adapter=adapter)
    return list(last.outputs[0].token_ids)


def folders_of_copies() -> list[str]:
    names = os.listdir(tempfile.gettempdir())
    return [name for name in names if name.startswith("loraplex-adapters-")]
