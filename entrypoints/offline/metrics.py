"""Offers an engine's statistics as vLLM's metrics; classes and names are vLLM's."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """A named value. `labels` tell apart metrics of one name."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """A number that may grow and shrink."""

    value: float


@dataclass(frozen=True, slots=True)
class Vector(Metric):
    """An ordered list of counters. No metric of loraplex is one."""

    values: list[int]


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """Values counted in buckets.

    A bucket's key is its upper bound as text, the last one "+Inf". Its value counts everything up
    to that bound.
    """

    count: int
    sum: float
    buckets: dict[str, int]


_GAUGES = {"num_requests_running": "running", "num_requests_waiting": "waiting"}
_COUNTERS = {
    "prefix_cache_queries": "prefix_query_tokens",
    "prefix_cache_hits": "prefix_hit_tokens",
    "num_preemptions": "num_preemptions",
    "generation_tokens": "num_generated_tokens",
}


def metrics_of(
    stats: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
    *,
    model_name: str,
    max_loras: int,
) -> list[Metric]:
    """Returns the metrics of an engine.

    Histograms and prompt tokens are of finished requests.

    Args:
        stats: what Client.stats() returns.
        adapters: what Client.list_adapters() returns.
        model_name: the label of every metric.
        max_loras: adapters that may be in pages at one time.
    """
    labels = {"model_name": model_name, "engine": "0"}
    histograms = stats["frontend"]["histograms"]
    found: list[Metric] = []
    for name, key in _GAUGES.items():
        found.append(Gauge(f"vllm:{name}", labels, float(stats[key])))
    usage = stats["pages_kv"] / max(1, stats["num_pages"])
    found.append(Gauge("vllm:kv_cache_usage_perc", labels, usage))
    found.append(_lora_info(adapters, max_loras))
    for name, key in _COUNTERS.items():
        found.append(Counter(f"vllm:{name}", labels, stats[key]))
    num_prompt = int(histograms["request_prompt_tokens"]["sum"])
    found.append(Counter("vllm:prompt_tokens", labels, num_prompt))
    for reason, count in stats["finished"].items():
        by_reason = {**labels, "finished_reason": reason}
        found.append(Counter("vllm:request_success", by_reason, count))
    found += [Histogram(f"vllm:{name}", labels, **value) for name, value in histograms.items()]
    return found


def _lora_info(adapters: Sequence[Mapping[str, Any]], max_loras: int) -> Gauge:
    """Returns the adapters of running and waiting requests; the value is the time, as in vLLM."""

    def names(count: str) -> str:
        return ",".join(sorted(row["name"] for row in adapters if row[count]))

    labels = {
        "max_lora": str(max_loras),
        "running_lora_adapters": names("num_running"),
        "waiting_lora_adapters": names("num_waiting"),
    }
    return Gauge("vllm:lora_requests_info", labels, time.time())
