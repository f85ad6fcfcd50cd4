"""Several engines behind one endpoint: streams go on when an engine or the router dies."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.launchers import LOCAL_RAY, NO_RAY
from loraplex.engine.cluster.process_launcher import device_environment
from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import GUARD_S, fake_worker_command, is_alive, wait_until

pytestmark = pytest.mark.e2e
NUM_STREAMS = 50
MAX_TOKENS = 120


@pytest.fixture(scope="module", params=[NO_RAY, LOCAL_RAY])
def cluster(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[EngineCluster]:
    if request.param == LOCAL_RAY:
        pytest.importorskip("ray")
    root: Path = tmp_path_factory.mktemp("adapters")
    for i in range(4):
        make_fake_adapter(root / f"a{i}", f"content {i}")
    config = fake_config(adapter=AdapterConfig(adapter_root=str(root)))
    command = fake_worker_command("--delay", "0.02")
    cluster = EngineCluster(
        config, num_engines=2, ray_address=request.param, worker_command=command
    )
    cluster.start(timeout_s=GUARD_S)
    with cluster, Client(cluster.endpoint) as client:
        for i in range(4):
            client.load_adapter(f"a{i}", str(root / f"a{i}"))
        yield cluster
        pids = [pid for engine in cluster.engines.values() for pid in engine.pids.values()]
        pids.append(cluster.router_pid)
    wait_until(lambda: not any(map(is_alive, pids)))


def stream(endpoint: str, index: int, started: "threading.Semaphore | None" = None) -> None:
    """Fails unless the whole answer comes, token for token."""
    prompt, name = [index, index + 1, 7], ["", "a0", "a1", "a2", "a3"][index % 5]
    with Client(endpoint) as client:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        for output in client.generate(prompt, params, adapter=name):
            if started is not None and output.outputs[0].token_ids:
                started.release()
                started = None
        content = f"content {name[1:]}" if name else ""
        expected = expected_tokens(prompt, content, max_tokens=MAX_TOKENS)
        assert output.outputs[0].token_ids == expected, index
        assert output.outputs[0].finish_reason == "length"


def stream_many(cluster: EngineCluster, strike: "threading.Thread | None" = None) -> None:
    """Run NUM_STREAMS at once; `strike` starts when all have begun."""
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        runs = [pool.submit(stream, cluster.endpoint, i, started) for i in range(NUM_STREAMS)]
        if strike is not None:
            for _ in range(NUM_STREAMS // 2):
                assert started.acquire(timeout=GUARD_S)
            strike.start()
        for run in runs:
            run.result(GUARD_S)


def test_streams_end_complete_when_an_engine_is_killed(cluster: EngineCluster) -> None:
    victim, engine = next(iter(cluster.engines.items()))
    pid = engine.pids.get("actor", engine.pids["scheduler"])  # Ray restarts an actor that was killed
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


def test_a_router_that_dies_comes_back_and_finds_its_engines(cluster: EngineCluster) -> None:
    pid = cluster.router_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cluster.router_pid != pid)
    with Client(cluster.endpoint) as client:
        wait_until(lambda: bool(client.stats()["engines"]))
    stream(cluster.endpoint, 0)


def test_devices_are_dealt_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_environment(1, 2) == (("CUDA_VISIBLE_DEVICES", "2,3"),)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert device_environment(0, 2) == (("CUDA_VISIBLE_DEVICES", "4,6"),)
    with pytest.raises(ConfigError, match="engine 1 needs GPUs 2 to 3 of the 3"):
        device_environment(1, 2)


def test_what_a_cluster_cannot_do_is_named() -> None:
    with pytest.raises(ConfigError, match="at least 1 engine"):
        EngineCluster(fake_config(), num_engines=0)
    with pytest.raises(ConfigError, match="placement must be one of"):
        EngineCluster(fake_config(), num_engines=1, placement="best")
