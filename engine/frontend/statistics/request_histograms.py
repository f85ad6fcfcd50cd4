"""Counts requests by times, lengths and ends; names and bounds are those of vLLM's metrics."""

from typing import Any

from loraplex.engine.frontend.outputs import OutputProcessor
from loraplex.engine.frontend.request_log import RequestTimes
from loraplex.scheduler.request import FINISH_REASONS
from loraplex.scheduler.statistics.bucket_counts import BucketCounts, zeros

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

_BETWEEN_TOKENS = "inter_token_latency_seconds"
BOUNDS = {
    "time_to_first_token_seconds": _FIRST_TOKEN_S,
    _BETWEEN_TOKENS: _TOKEN_S,
    "request_time_per_output_token_seconds": _TOKEN_S,
    "e2e_request_latency_seconds": _REQUEST_S,
    "request_queue_time_seconds": _REQUEST_S,
    "request_prefill_time_seconds": _REQUEST_S,
    "request_decode_time_seconds": _REQUEST_S,
    "request_inference_time_seconds": _REQUEST_S,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "request_params_n": _N,
}
"""Maps the name of each histogram to the upper bounds of its buckets."""


class RequestHistograms:
    """One histogram for each name in BOUNDS, and the number of sequences by finish reason."""

    NUM_CELLS = sum(map(BucketCounts.num_cells, BOUNDS.values())) + len(FINISH_REASONS)

    def __init__(self, cells: "memoryview[float] | None" = None) -> None:
        """Goes on with what `cells` hold; None: nothing was counted before."""
        if cells is None:
            cells = zeros(self.NUM_CELLS)
        self._ends = cells[: len(FINISH_REASONS)]
        self._histograms: dict[str, BucketCounts] = {}
        start = len(FINISH_REASONS)
        for name, bounds in BOUNDS.items():
            end = start + BucketCounts.num_cells(bounds)
            self._histograms[name] = BucketCounts(bounds, cells[start:end])
            start = end
        self._gaps = self._histograms[_BETWEEN_TOKENS]

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
            "request_prefill_time_seconds": times.first_token_s - times.queued_s,
            "request_decode_time_seconds": decode_s,
            "request_inference_time_seconds": times.last_token_s - times.queued_s,
            "request_prompt_tokens": float(num_prompt),
            "request_generation_tokens": float(num_output),
            "request_params_n": float(n),
        }
        for name, value in values.items():
            self._histograms[name].observe(value)

    def observe_gap(self, seconds: float | None) -> None:
        """Counts the time between two outputs of a sequence; None: there was one output."""
        if seconds is not None:
            self._gaps.observe(seconds)

    def count_ends(self, reason: str, outputs: OutputProcessor | None, n: int) -> None:
        """Counts the sequences of a request that has ended.

        Args:
            reason: why it has ended: a finish reason, "client left" or an error code. It is that of
                the sequences that have none of their own.
            outputs: None if the prompt was not tokenized yet.
            n: sequences of the request.
        """
        ends = [c.finish_reason for c in outputs.completions] if outputs else [None] * n
        for end in ends:
            self.count_end(end or ("abort" if reason == "client left" else reason))

    def count_end(self, reason: str) -> None:
        """Counts a sequence; a reason that is not in FINISH_REASONS is an error."""
        known = reason if reason in FINISH_REASONS else "error"
        self._ends[FINISH_REASONS.index(known)] += 1

    @property
    def ends(self) -> dict[str, int]:
        """The number of sequences that have ended, by finish reason."""
        return dict(zip(FINISH_REASONS, map(int, self._ends), strict=True))

    def snapshot(self) -> dict[str, Any]:
        """Returns `sum`, `count` and `buckets` of each histogram, as BucketCounts.snapshot()."""
        return {name: histogram.snapshot() for name, histogram in self._histograms.items()}
