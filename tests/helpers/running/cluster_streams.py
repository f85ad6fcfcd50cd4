"""A cluster of fake engines with four adapters, and streams of it whose answers are known."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import GUARD_S, fake_worker_command

NUM_STREAMS = 50
MAX_TOKENS = 120


@contextmanager
def fake_cluster(root: Path, *, num_routers: int = 1, **options: Any) -> Iterator[EngineCluster]:
    """Yields a started cluster; a client has loaded the adapters."""
    for i in range(4):
        make_fake_adapter(root / f"a{i}", f"content {i}")
    config = fake_config(
        adapter=AdapterConfig(adapter_root=str(root)),
        server=ServerConfig(endpoint="tcp://127.0.0.1:0", num_frontends=num_routers),
    )
    command = fake_worker_command("--delay", "0.02")
    cluster = EngineCluster(config, worker_command=command, **options)
    cluster.start(timeout_s=GUARD_S)
    with cluster:
        with Client(cluster.endpoint) as client:
            for i in range(4):
                client.load_adapter(f"a{i}", str(root / f"a{i}"))
        yield cluster


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
