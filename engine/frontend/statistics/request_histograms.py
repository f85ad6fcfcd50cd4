"""Counts finished requests by times and lengths; names and bounds are those of vLLM's metrics."""

from bisect import bisect_left
from typing import Any

from loraplex.engine.frontend.request_log import RequestTimes

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(d * 10**e) for e in range(6) for d in (1, 2, 5))
_N = (1.0, 2.0, 5.0, 10.0, 20.0)

BOUNDS = {
    "time_to_first_token_seconds": _FIRST_TOKEN_S,
    "request_time_per_output_token_seconds": _TOKEN_S,
    "e2e_request_latency_seconds": _REQUEST_S,
    "request_queue_time_seconds": _REQUEST_S,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "request_params_n": _N,
}
"""Maps the name of each histogram to the upper bounds of its buckets."""


class RequestHistograms:
    """One histogram for each name in BOUNDS."""

    def __init__(self) -> None:
        self._counts = {name: [0] * (len(bounds) + 1) for name, bounds in BOUNDS.items()}
        self._sums = dict.fromkeys(BOUNDS, 0.0)

    def observe(self, times: RequestTimes, *, num_prompt: int, num_output: int, n: int) -> None:
        """Counts a request that has finished, unless it has no token."""
        if times.first_token_s < 0:
            return
        decode_s = times.last_token_s - times.first_token_s
        values = {
            "time_to_first_token_seconds": times.first_token_s,
            "request_time_per_output_token_seconds": decode_s / max(1, num_output / n - 1),
            "e2e_request_latency_seconds": times.last_token_s,
            "request_queue_time_seconds": times.queued_s,
            "request_prompt_tokens": float(num_prompt),
            "request_generation_tokens": float(num_output),
            "request_params_n": float(n),
        }
        for name, value in values.items():
            self._counts[name][bisect_left(BOUNDS[name], value)] += 1
            self._sums[name] += value

    def snapshot(self) -> dict[str, Any]:
        """Returns `sum`, `count` and `buckets` of each histogram.

        A bucket's key is its upper bound as text; its value counts all requests up to that bound.
        """
        return {name: self._describe(name) for name in BOUNDS}

    def _describe(self, name: str) -> dict[str, Any]:
        buckets: dict[str, int] = {}
        total = 0
        for bound, count in zip((*map(str, BOUNDS[name]), "+Inf"), self._counts[name], strict=True):
            total += count
            buckets[bound] = total
        return {"sum": self._sums[name], "count": total, "buckets": buckets}
