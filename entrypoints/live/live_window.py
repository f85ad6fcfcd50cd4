"""Rates and first-token percentiles over the last seconds, from counters that only grow."""

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from loraplex.scheduler.adapters.usage import NUM_TTFT_BUCKETS, Usage

RATE_S = 2.0
WINDOW_S = 60.0

RATES = {
    "generated_tokens": "num_generated_tokens",
    "computed_tokens": "num_scheduled_tokens",
    "requests": "num_requests",
    "preemptions": "num_preemptions",
    "adapter_loads": "num_adapter_loads",
}
"""Name of each rate by the counter of `stats` that it comes from."""


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    counters: dict[str, int]
    first_tokens: list[int] = field(default_factory=list)  # [NUM_TTFT_BUCKETS]


class LiveWindow:
    """Keeps the samples of the last WINDOW_S seconds. `at_s` is a time of one monotonic clock."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def add(self, stats: dict[str, Any], at_s: float) -> None:
        """Takes what a `stats` message holds."""
        counters = {name: int(stats.get(key, 0)) for name, key in RATES.items()}
        first_tokens = list(stats.get("first_tokens_by_us", {}).values())
        self._samples.append(_Sample(at_s, counters, first_tokens or [0] * NUM_TTFT_BUCKETS))
        while len(self._samples) > 2 and self._samples[1].at_s <= at_s - WINDOW_S:
            self._samples.popleft()

    def rates(self) -> dict[str, float]:
        """Returns the rates a second over the last RATE_S seconds; 0 before the second sample."""
        last = self._samples[-1]
        recent = [sample for sample in self._samples if sample.at_s <= last.at_s - RATE_S]
        first = recent[-1] if recent else self._samples[0]
        seconds = last.at_s - first.at_s
        if seconds <= 0:
            return dict.fromkeys(RATES, 0.0)
        return {
            name: max(0, count - first.counters[name]) / seconds
            for name, count in last.counters.items()
        }

    def first_tokens(self) -> dict[str, Any]:
        """Returns percentiles over the window, and over all time where the window has none."""
        first, last = self._samples[0], self._samples[-1]
        recent = [max(0, b - a) for a, b in zip(first.first_tokens, last.first_tokens, strict=True)]
        seconds = min(WINDOW_S, last.at_s - first.at_s)
        if any(recent):
            return {"window_s": seconds, **_percentiles(recent)}
        return {"window_s": None, **_percentiles(last.first_tokens)}


def _percentiles(counts: list[int]) -> dict[str, Any]:
    usage = Usage(num_first_tokens=sum(counts), ttft_counts=array("I", counts))
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}
    if not usage.num_first_tokens:
        return {"count": 0, **dict.fromkeys(shares)}
    values = {name: round(usage.ttft_quantile_ms(share), 2) for name, share in shares.items()}
    return {"count": usage.num_first_tokens, **values}
