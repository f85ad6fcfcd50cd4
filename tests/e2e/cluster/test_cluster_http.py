"""The HTTP server of a cluster: answers, adapters, and a stream that outlives an engine."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.entrypoints.cli import main as cli
from loraplex.entrypoints.http.routes.metrics_routes import FRESH_S

from helpers.running.http_answers import text_streamed
from helpers.running.http_server import BASE, http_config, make_models
from helpers.running.processes import GUARD_S, wait_until
from helpers.scheduling.metric_scrapes import labels_of, parse, value, values_of

pytestmark = pytest.mark.e2e
PROMPT = "Numbers: 0 1 2"
CHAT: Any = [{"role": "user", "content": "What is a page?"}]
FIELDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 12},
    {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 12},
]


@dataclass(frozen=True)
class ServedCluster:
    cluster: EngineCluster
    root: Path
    api: openai.OpenAI

    @property
    def url(self) -> str:
        return f"http://{self.cluster.http_endpoint}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    root = tmp_path_factory.mktemp("cluster-http")
    make_models(root)
    with EngineCluster(http_config(root), num_engines=2, ray_address=NO_RAY) as cluster:
        cluster.start(GUARD_S)
        url = f"http://{cluster.http_endpoint}/v1"
        yield ServedCluster(cluster, root, openai.OpenAI(base_url=url, api_key="none"))


@pytest.mark.parametrize("fields", FIELDS, ids=["greedy", "seeded"])
def test_answers_equal_those_over_zmq(fields: dict[str, Any], served: ServedCluster) -> None:
    with Client(served.cluster.endpoint) as client:
        *_, text = client.generate(PROMPT, SamplingParams(**fields), adapter="a")
        *_, chat = client.generate({"messages": CHAT}, SamplingParams(**fields), adapter="b")
    completion = served.api.completions.create(model="a", prompt=PROMPT, **fields)
    assert [c.text for c in completion.choices] == [c.text for c in text.outputs]
    stream = served.api.completions.create(model="a", prompt=PROMPT, stream=True, **fields)
    assert text_streamed(stream) == {c.index: (c.text, c.finish_reason) for c in text.outputs}
    answer = served.api.chat.completions.create(model="b", messages=CHAT, **fields)
    assert [c.message.content for c in answer.choices] == [c.text for c in chat.outputs]


def test_models_and_health(served: ServedCluster) -> None:
    assert {model.id for model in served.api.models.list()} >= {BASE, "a", "b"}
    assert httpx.get(f"{served.url}/health").status_code == 200
    with pytest.raises(openai.NotFoundError, match="nobody"):
        served.api.completions.create(model="nobody", prompt=PROMPT)


def test_metrics_show_each_engine(served: ServedCluster) -> None:
    for model in (BASE, "a"):
        served.api.completions.create(model=model, prompt=PROMPT, max_tokens=3)
    time.sleep(FRESH_S)
    found = parse(httpx.get(f"{served.url}/metrics", timeout=GUARD_S).text)
    running = labels_of(found, "vllm:num_requests_running")
    assert {labels["engine"] for labels in running} == set(served.cluster.engines)
    assert value(found, "loraplex_engines", state="up", engine="router") == 2
    assert values_of(found, "vllm:lora_adapter_loaded", adapter_name="a", level="gpu")
    assert value(found, "vllm:num_requests_waiting", engine="router") == 0
    assert value(found, "loraplex_router_moves_total", engine="router") == 0
    assert value(found, "loraplex_lost_engines_total", engine="router") == 0
    ends = values_of(found, "vllm:request_success_total", engine="router")
    assert sum(ends) >= 2
    assert sum(values_of(found, "vllm:generation_tokens_total")) >= 6


def test_the_console_shows_the_pools_of_both_engines(served: ServedCluster) -> None:
    assert 'id="adapters"' in httpx.get(served.url).text
    served.api.completions.create(model="b", prompt=PROMPT, max_tokens=3)
    with httpx.stream("GET", f"{served.url}/loraplex/live", timeout=GUARD_S) as events:
        line = next(line for line in events.iter_lines() if line.startswith("data: "))
    view = json.loads(line.removeprefix("data: "))
    engines = sorted(served.cluster.engines)
    assert [pool["engine"] for pool in view["pools"]] == engines
    for pool in view["pools"]:
        assert sum(pool["runs"][1::2]) == pool["num_pages"] == 599
        assert set(pool["runs"][::2]) - {0, 1, 2} == {3 + int(slot) for slot in pool["slots"]}
    assert view["pages"]["num_pages"] == 2 * 599
    rows = {row["name"]: row for row in view["adapters"]}
    assert rows["b"]["tier"] == "pages" and set(rows["b"]["engines"]) <= set(engines)
    assert view["adapter_counts"]["registered_adapters"] == len(rows)


def test_bench_measures_a_running_cluster(served: ServedCluster, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    flags = ["--num-adapters", "2", "--num-requests", "3", "--lengths", "4,9", "--out", str(out)]
    assert cli.main(["bench", "cluster", "--endpoint", served.cluster.endpoint, *flags]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["bench"], row["case"], row["engines"]) == ("cluster", "cluster", 2)
    assert (row["num_requests"], row["num_adapters"], row["moves"]) == (6, 2, 0)
    assert row["new_tokens"] >= 24 and 0 < row["alone_ttft_ms_p50"] <= row["alone_ttft_ms_p99"]


def test_a_stream_and_a_loaded_adapter_outlive_their_engine(served: ServedCluster) -> None:
    body = {"lora_name": "new", "lora_path": str(served.root / "spare")}
    httpx.post(f"{served.url}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()
    options: dict[str, Any] = {
        "model": "new", "prompt": PROMPT, "temperature": 0.0, "max_tokens": 400, "stream": True,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = text_streamed(served.api.completions.create(**options))
    stream = iter(served.api.completions.create(**options))
    first = next(stream)
    former = served.cluster.engines
    with Client(served.cluster.endpoint) as client:
        busy = [k for k, v in client.stats()["engines"].items() if v["running"]]
    for engine_id in busy or former:  # it has ended already: on a fast machine
        os.kill(former[engine_id].pids["worker 0"], signal.SIGKILL)
        break
    assert text_streamed(iter([first, *stream])) == whole
    wait_until(lambda: len(served.cluster.engines.keys() - former.keys()) == 1)
    for engine_id in former.keys() & served.cluster.engines.keys():
        served.cluster.drain(engine_id)  # the new engine must answer
    again = text_streamed(served.api.completions.create(**options))
    assert again == whole
