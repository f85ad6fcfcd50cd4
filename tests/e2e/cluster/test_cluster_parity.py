"""Two engines of a real model give the answers of one, also when one of them is killed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import LLM, Cluster, SamplingParams
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.entrypoints.client.outputs import RequestOutput

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import make_adapters
from helpers.running.processes import GUARD_S

pytestmark = pytest.mark.e2e
ADAPTERS = ("", "r8-qkvo", "r4-regex")
NUM_REQUESTS = 200
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "num_pages": 1024, "max_num_seqs": 32,
    "max_num_batched_tokens": 256, "skip_tokenizer_init": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("cluster")
    make_adapters(make_hf_model("llama", root / "base", seed=3), root / "adapters")
    return root


def params(i: int) -> SamplingParams:
    common: dict[str, Any] = {"max_tokens": 20 + i % 20, "ignore_eos": True, "detokenize": False}
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": i, "top_p": 0.9},
        {"temperature": 0.8, "seed": i, "presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"temperature": 0.9, "seed": i, "n": 2},
        {"temperature": 0.0, "logprobs": 2, "min_tokens": 10, "stop_token_ids": [*range(200)]},
    )
    return SamplingParams(**common | kinds[i % len(kinds)])


def submit(client: Any, i: int) -> None:
    prompt = [(7 * i + k) % 300 + 5 for k in range(1 + i % 40)]
    client.submit(prompt, params(i), adapter=ADAPTERS[i % len(ADAPTERS)], request_id=str(i))


def collect(client: Any) -> Iterator[RequestOutput]:
    while client.num_outstanding:
        for result in client.poll(GUARD_S):
            assert isinstance(result, RequestOutput), result
            yield result


def answers(results: Iterator[RequestOutput]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for result in results:
        assert result.request_id not in found, "answered twice"
        found[result.request_id] = [
            (list(o.token_ids), o.finish_reason, o.stop_reason) for o in result.outputs
        ]
    return found


@pytest.mark.parametrize("ray_address", ["", pytest.param(NO_RAY, marks=pytest.mark.long)])
def test_two_engines_answer_as_one_also_when_one_is_killed(model: Path, ray_address: str) -> None:
    adapters = {name: str(model / "adapters" / name) for name in ADAPTERS[1:]}
    with LLM(str(model / "base"), adapters=adapters, **OPTIONS) as llm:
        for i in range(NUM_REQUESTS):
            submit(llm.client, i)
        whole = answers(collect(llm.client))
    assert len(whole) == NUM_REQUESTS
    options = OPTIONS | {"adapters": adapters, "ray_address": ray_address}
    with Cluster(str(model / "base"), num_engines=2, **options) as cluster:
        rounds = (False, True) if ray_address == NO_RAY else (True,)  # the long test has both
        for kills in rounds:
            for i in range(NUM_REQUESTS):
                submit(cluster.client, i)
            results = collect(cluster.client)
            first = [next(results) for _ in range(20)]
            if kills:
                os.kill(cluster.pids[0]["worker 0"], signal.SIGKILL)
            again = answers(iter([*first, *results]))
            assert again == whole
        assert cluster.client.stats()["router"]["moves"] > 0
