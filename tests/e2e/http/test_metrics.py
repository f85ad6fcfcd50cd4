"""GET /metrics of a real engine, against requests that the test counts itself."""

import json
import os
import re
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.config import ServerConfig
from loraplex.engine.processes.engine import Engine
from loraplex.engine.stores.store_counts import StoreCounts
from loraplex.entrypoints.http.routes.metrics_routes import FRESH_S

from helpers.fakes.fake_engine import fake_config
from helpers.running.http_server import BASE, Served
from helpers.running.processes import GUARD_S, running_engine, wait_until
from helpers.scheduling.metric_scrapes import (
    Values,
    labels_of,
    parse,
    scraped,
    stats_of,
    value,
    values_of,
)
from helpers.scheduling.scheduler_harness import Harness

pytestmark = pytest.mark.e2e
DASHBOARD = Path(__file__).parents[3] / "examples" / "grafana" / "dashboard.json"
FIRST = "vllm:time_to_first_token_seconds"


def scrape(engine: Engine) -> Values:
    """Returns a scrape that is newer than what happened before the call."""
    time.sleep(FRESH_S)
    response = httpx.get(f"http://{engine.http_endpoint}/metrics", timeout=GUARD_S)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return parse(response.text)


def growth(before: Values, after: Values, name: str, **labels: str) -> float:
    return sum(values_of(after, name, **labels)) - sum(values_of(before, name, **labels))


def test_values_are_those_of_known_requests(served: Served) -> None:
    before = scrape(served.engine)
    for model, num_tokens in ((BASE, 5), ("a", 7), ("b", 4)):
        body = {"model": model, "prompt": [3, 4, 5], "max_tokens": num_tokens, "ignore_eos": True}
        httpx.post(f"{served.url}/v1/completions", json=body, timeout=GUARD_S).raise_for_status()
    with served.zmq() as client:
        params = SamplingParams(max_tokens=6, n=2, ignore_eos=True, seed=1)
        *_, last = client.generate([3, 4, 5, 6], params, adapter="a")
        assert last.finished
    after = scrape(served.engine)
    assert growth(before, after, "vllm:generation_tokens_total") == 5 + 7 + 4 + 2 * 6
    assert growth(before, after, "vllm:prompt_tokens_total") == 3 * 3 + 2 * 4
    ends = {"finished_reason": "length"}
    assert growth(before, after, "vllm:request_success_total", **ends) == 5
    assert growth(before, after, f"{FIRST}_count") == 4
    assert growth(before, after, f"{FIRST}_bucket", le="2560.0") == 4
    gaps = (5 - 1) + (7 - 1) + (4 - 1) + 2 * (6 - 1)
    assert growth(before, after, "vllm:inter_token_latency_seconds_count") == gaps
    assert growth(before, after, "vllm:request_generation_tokens_sum") == 28
    assert growth(before, after, "vllm:request_params_n_sum") == 5
    assert value(after, "vllm:num_requests_running", model_name=BASE, engine="0") == 0
    (info,) = labels_of(after, "vllm:lora_requests_info")
    assert {"a", "b"} <= set(info["running_lora_adapters"].split(","))
    for name in ("a", "b"):
        assert value(after, "vllm:lora_adapter_loaded", adapter_name=name, level="gpu") == 1
    assert sum(values_of(after, "loraplex_adapter_load_seconds_count")) >= 2
    assert growth(before, after, "loraplex_steps_total") > 0
    assert value(after, "loraplex_pool_bytes", rank="0") > 0


def test_the_dashboard_names_series_of_a_real_scrape(served: Served) -> None:
    exist = {name for name, _ in scrape(served.engine)} | {"loraplex_engines"}  # a cluster's
    stores = {"stores": StoreCounts().snapshot(), "cache_bytes": 0}
    exist |= {name for name, _ in scraped(stats_of(Harness()), **stores)}
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    texts = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    named = {name for text in texts for name in re.findall(r"(?:vllm:|loraplex_)\w+", text)}
    assert named <= exist, sorted(named - exist)


def test_each_server_counts_the_requests_of_all_frontends_also_of_dead_ones() -> None:
    server = ServerConfig(endpoint="tcp://127.0.0.1:0", http="127.0.0.1:0", num_frontends=2)
    with running_engine(replace(fake_config(), server=server)) as engine:
        url = f"http://{engine.http_endpoint}"
        num_requests = 0
        with ExitStack() as stack:
            clients: dict[httpx.Client, str] = {}
            while len(clients) < 8 or len(set(clients.values())) < 2:
                client = stack.enter_context(httpx.Client(timeout=GUARD_S))
                clients[client] = client.get(f"{url}/health").json()["instance"]
            for client in clients:
                body = {"prompt": [1, 2], "max_tokens": 3, "ignore_eos": True}
                client.post(f"{url}/v1/completions", json=body).raise_for_status()
                num_requests += 1
        with Client(engine.endpoint) as zmq_client:
            *_, last = zmq_client.generate([1, 2], SamplingParams(max_tokens=3))
            num_requests += 1
            assert value(scrape(engine), f"{FIRST}_count") == num_requests
            pid = engine.pids["http 0"]
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: engine.pids["http 0"] != pid)
            assert value(scrape(engine), f"{FIRST}_count") == num_requests
