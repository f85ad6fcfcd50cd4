"""The engine's statistics as vLLM's metrics."""

import time
from typing import Any

import pytest

from loraplex.engine.frontend.statistics.request_histograms import BOUNDS, RequestHistograms
from loraplex.entrypoints.offline.metrics import metrics_of
from loraplex.v1.metrics.reader import Counter, Gauge, Histogram, Metric

from helpers.scheduling.metric_scrapes import CONFIG, stats_of
from helpers.scheduling.scheduler_harness import Harness

INFO = "vllm:cache_config_info"


@pytest.fixture(scope="module")
def metrics() -> list[Metric]:
    """Those of an engine in which one request of the adapter "a" has ended and two wait."""
    harness = Harness()
    harness.register("a")
    harness.register("b")
    harness.add("first", [1, 2, 3, 4, 5], adapter="a", max_tokens=3, stop_token_ids=[])
    harness.run()
    for name in ("one", "two"):
        harness.add(name, [1], adapter="b", max_tokens=2)
    counts = RequestHistograms()
    counts.count_end("length")
    frontend = {"histograms": counts.snapshot(), "ends": counts.ends}
    return metrics_of(stats_of(harness) | {"frontend": frontend}, config=CONFIG)


def values(metrics: list[Metric], kind: type) -> dict[str, Any]:
    return {m.name: getattr(m, "value", None) for m in metrics if type(m) is kind}


def test_gauges_and_counters_have_vllms_names(metrics: list[Metric]) -> None:
    gauges, counters = values(metrics, Gauge), values(metrics, Counter)
    assert gauges["vllm:num_requests_running"] == 0
    assert gauges["vllm:num_requests_waiting"] == 2
    assert gauges["vllm:kv_cache_usage_perc"] == 0
    assert counters["vllm:prefix_cache_queries"] == 5
    assert counters["vllm:prefix_cache_hits"] == 0
    assert counters["vllm:prompt_tokens"] == 5
    assert counters["vllm:generation_tokens"] == 3
    named = [m for m in metrics if m.name not in ("vllm:lora_requests_info", INFO)]
    assert {m.labels["model_name"] for m in named} == {"m"}


def test_ends_are_told_apart_by_a_label(metrics: list[Metric]) -> None:
    ends = {m.labels["finished_reason"]: m.value for m in metrics
            if isinstance(m, Counter) and m.name == "vllm:request_success"}  # fmt: skip
    assert ends == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_adapters_are_named_by_their_place(metrics: list[Metric]) -> None:
    (info,) = [m for m in metrics if m.name == "vllm:lora_requests_info"]
    assert isinstance(info, Gauge)
    assert info.labels == {
        "max_lora": "1024",
        "running_lora_adapters": "a",
        "waiting_lora_adapters": "b",
    }
    assert abs(info.value - time.time()) < 3600


def test_histograms_are_the_frontends(metrics: list[Metric]) -> None:
    histograms = {m.name: m for m in metrics if isinstance(m, Histogram)}
    assert histograms.pop("vllm:iteration_tokens_total").count > 0
    assert histograms.keys() == {f"vllm:{name}" for name in BOUNDS}
    assert all(m.count == 0 and list(m.buckets)[-1] == "+Inf" for m in histograms.values())
