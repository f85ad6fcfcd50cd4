"""Counts of what one adapter did for its requests, of fixed size."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.scheduler.worker_protocol import AdapterLoaded

TIERS = ("pages", "host", "disk")
"""Places of an adapter, the fastest first."""

NUM_TTFT_BUCKETS = 20
FIRST_TTFT_US = 512
"""Upper bound of bucket 0, in microseconds. Each bucket doubles the bound; the last has none."""


@dataclass(slots=True)
class Usage:
    """Counts of one name since it was registered, over all its versions; or of many names."""

    num_requests: int = 0  # accepted
    num_ended: int = 0
    num_prompt_tokens: int = 0  # of requests that got a first token
    num_generated_tokens: int = 0  # of requests that have ended
    num_first_tokens: int = 0
    ttft_us: int = 0  # sum
    ttft_counts: "array[int] | None" = None  # [NUM_TTFT_BUCKETS]; None: no first token yet
    tier_counts: "array[int] | None" = None  # by TIERS: requests with a first token
    num_loads: int = 0
    num_load_failures: int = 0
    load_us: int = 0  # sum
    max_load_us: int = 0

    def add_first_token(self, num_prompt_tokens: int, ttft_us: int, tier: int) -> None:
        """Count a first token; `tier` indexes TIERS."""
        if self.ttft_counts is None or self.tier_counts is None:
            self.ttft_counts = array("I", bytes(4 * NUM_TTFT_BUCKETS))
            self.tier_counts = array("I", bytes(4 * len(TIERS)))
        self.num_first_tokens += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.ttft_us += ttft_us
        bucket = (ttft_us // FIRST_TTFT_US).bit_length()
        self.ttft_counts[min(bucket, NUM_TTFT_BUCKETS - 1)] += 1
        self.tier_counts[tier] += 1

    def add_load(self, event: AdapterLoaded) -> None:
        if event.error:
            self.num_load_failures += 1
            return
        self.num_loads += 1
        self.load_us += event.load_us
        self.max_load_us = max(self.max_load_us, event.load_us)

    def ttft_quantile_ms(self, share: float) -> float:
        """Estimate a quantile within the bucket that holds it, linearly; 0 without any tokens."""
        left = share * self.num_first_tokens
        for bucket, count in enumerate(self.ttft_counts or ()):
            if count and left <= count:
                end = FIRST_TTFT_US << bucket
                start = end // 2 if bucket else 0
                return (start + (end - start) * left / count) / 1e3
            left -= count
        return 0.0

    def snapshot(self) -> dict[str, Any]:
        """Return plain values; times in milliseconds."""
        return {
            "num_requests": self.num_requests,
            "num_ended": self.num_ended,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            "num_first_tokens": self.num_first_tokens,
            "ttft_mean_ms": self.ttft_us / 1e3 / max(1, self.num_first_tokens),
            "ttft_p50_ms": self.ttft_quantile_ms(0.5),
            "ttft_p99_ms": self.ttft_quantile_ms(0.99),
            "num_loads": self.num_loads,
            "num_load_failures": self.num_load_failures,
            "load_mean_ms": self.load_us / 1e3 / max(1, self.num_loads),
            "load_max_ms": self.max_load_us / 1e3,
            "hits": dict(zip(TIERS, self.tier_counts or (0,) * len(TIERS), strict=True)),
        }


def merge_snapshots(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the snapshot of all parts together; an empty part counts nothing.

    Quantiles are the largest of the parts: that of all together is no larger.
    """
    known = [part for part in parts if part]
    if not known:
        return {}
    total = {key: sum(part[key] for part in known) for key in known[0] if key.startswith("num_")}
    for key in ("ttft_p50_ms", "ttft_p99_ms", "load_max_ms"):
        total[key] = max(part[key] for part in known)
    for key, count in (("ttft_mean_ms", "num_first_tokens"), ("load_mean_ms", "num_loads")):
        total[key] = sum(part[key] * part[count] for part in known) / max(1, total[count])
    total["hits"] = {tier: sum(part["hits"][tier] for part in known) for tier in TIERS}
    return total
