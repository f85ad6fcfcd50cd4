"""The engine's statistics as vLLM's metrics."""

import time
from typing import Any

from loraplex.engine.frontend.statistics.request_histograms import BOUNDS, RequestHistograms
from loraplex.entrypoints.offline.metrics import metrics_of
from loraplex.v1.metrics.reader import Counter, Gauge, Histogram, Metric

STATS: dict[str, Any] = {
    "running": 3, "waiting": 4, "pages_kv": 25, "num_pages": 100,
    "prefix_query_tokens": 50, "prefix_hit_tokens": 20, "num_preemptions": 1,
    "num_generated_tokens": 77, "finished": {"stop": 5, "length": 6},
    "frontend": {"histograms": RequestHistograms().snapshot()},
}  # fmt: skip
ADAPTERS = [
    {"name": "b", "num_running": 1, "num_waiting": 0},
    {"name": "a", "num_running": 2, "num_waiting": 1},
    {"name": "idle", "num_running": 0, "num_waiting": 0},
]


def metrics() -> list[Metric]:
    return metrics_of(STATS, ADAPTERS, model_name="m", max_loras=8)


def values(kind: type) -> dict[str, Any]:
    return {m.name: getattr(m, "value", None) for m in metrics() if type(m) is kind}


def test_gauges_and_counters_have_vllms_names() -> None:
    gauges, counters = values(Gauge), values(Counter)
    assert gauges["vllm:num_requests_running"] == 3
    assert gauges["vllm:num_requests_waiting"] == 4
    assert gauges["vllm:kv_cache_usage_perc"] == 0.25
    assert counters["vllm:prefix_cache_queries"] == 50
    assert counters["vllm:prefix_cache_hits"] == 20
    assert counters["vllm:generation_tokens"] == 77
    assert all(
        metric.labels["model_name"] == "m" for metric in metrics() if "lora" not in metric.name
    )


def test_ends_are_told_apart_by_a_label() -> None:
    ends = {m.labels["finished_reason"]: m.value for m in metrics()
            if isinstance(m, Counter) and m.name == "vllm:request_success"}  # fmt: skip
    assert ends == {"stop": 5, "length": 6}


def test_adapters_in_use_are_named() -> None:
    (info,) = [m for m in metrics() if m.name == "vllm:lora_requests_info"]
    assert isinstance(info, Gauge)
    assert info.labels == {
        "max_lora": "8",
        "running_lora_adapters": "a,b",
        "waiting_lora_adapters": "a",
    }
    assert abs(info.value - time.time()) < 3600


def test_histograms_are_the_frontends() -> None:
    histograms = [m for m in metrics() if isinstance(m, Histogram)]
    assert {m.name for m in histograms} == {f"vllm:{name}" for name in BOUNDS}
    assert all(m.count == 0 and list(m.buckets)[-1] == "+Inf" for m in histograms)
