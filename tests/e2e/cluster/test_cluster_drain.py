"""SIGTERM to a cluster: the streams of its routers end complete before it stops."""

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.config import ServerConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.processes import fake_worker_command

pytestmark = pytest.mark.e2e
NUM_STREAMS = 8
MAX_TOKENS = 60


def stream(endpoint: str, index: int, begun: threading.Semaphore) -> bool:
    """Returns True if the whole answer came."""
    prompt = [index, 7]
    with Client(endpoint) as client:
        answer = client.generate(prompt, SamplingParams(max_tokens=MAX_TOKENS))
        next(answer)
        begun.release()
        *_, last = answer
    return last.outputs[0].token_ids == expected_tokens(prompt, max_tokens=MAX_TOKENS)


def test_a_cluster_drains() -> None:
    config = fake_config(server=ServerConfig(endpoint="tcp://127.0.0.1:0", drain_timeout=500))
    command = fake_worker_command("--delay", "0.02")
    cluster = EngineCluster(config, num_engines=2, ray_address="none", worker_command=command)
    answers: list[Future[bool]] = []

    with ThreadPoolExecutor(NUM_STREAMS) as pool:

        def signal_when_begun(started: EngineCluster) -> None:
            begun = threading.Semaphore(0)
            answers.extend(
                pool.submit(stream, started.endpoint, i, begun) for i in range(NUM_STREAMS)
            )
            for _ in range(NUM_STREAMS):
                begun.acquire()
            os.kill(os.getpid(), signal.SIGTERM)

        assert cluster.serve(on_ready=signal_when_begun) == 0
        assert all(answer.result() for answer in answers)
