"""Sends a trace to an engine and records when its tokens reach this client."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from loraplex.engine.errors import LoraplexError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.bench.traces import TraceRequest
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput
from loraplex.entrypoints.client.sync_client import Client

MEASURED = (
    "times are taken in the client from streamed outputs over ZeroMQ; TTFT counts from the "
    "request's due time, waiting in queues included"
)
_SEND_AT_ONCE = 16  # requests sent before the answers are read again
_MAX_WAIT_S = 1.0


@dataclass(slots=True)
class Timeline:
    """Arrival times of one request's tokens, in seconds from the start of the run."""

    due_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens so far)
    error: LoraplexError | None = None

    @property
    def num_tokens(self) -> int:
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.due_s

    def gaps_s(self, start_s: float = 0.0, end_s: float = float("inf")) -> Iterator[float]:
        """Seconds between tokens that arrived within the window.

        The gap before a message is divided equally among the tokens in it.
        """
        for (before, count), (after, grown) in zip(self.arrivals, self.arrivals[1:], strict=False):
            if start_s <= before and after <= end_s:
                yield from [(after - before) / (grown - count)] * (grown - count)


class LoadGenerator:
    """Sends requests through one client when they are due, and reads the streamed answers."""

    def __init__(
        self, client: Client, adapter_names: Sequence[str], *, detokenize: bool, max_open: int
    ) -> None:
        """`max_open` is the largest number of unfinished requests that the engine accepts."""
        self._client = client
        self._names = adapter_names
        self._detokenize = detokenize
        self._max_open = max_open

    def run(
        self, trace: Sequence[TraceRequest], prompts: Sequence[list[int]], *, title: str
    ) -> list[Timeline]:
        """Send all requests and wait until each has ended; returns timelines in trace order."""
        client = self._client
        timelines = [Timeline(request.arrival_s) for request in trace]
        number_of: dict[str, int] = {}
        num_sent = num_ended = 0
        start = time.perf_counter()
        with tqdm(total=len(trace), desc=title, disable=None, dynamic_ncols=True) as bar:
            while num_ended < len(trace):
                now = time.perf_counter() - start
                for _ in range(_SEND_AT_ONCE):
                    if num_sent == len(trace) or trace[num_sent].arrival_s > now:
                        break
                    if num_sent - num_ended == self._max_open:
                        break
                    number_of[self._send(trace[num_sent], prompts[num_sent])] = num_sent
                    num_sent += 1
                wait_s = _MAX_WAIT_S
                if num_sent < len(trace) and num_sent - num_ended < self._max_open:
                    wait_s = min(wait_s, max(0.0, trace[num_sent].arrival_s - now))
                if num_sent == num_ended:  # poll() returns at once when nothing is open
                    time.sleep(wait_s)
                outputs = client.poll(wait_s)
                now = time.perf_counter() - start
                for output in outputs:
                    if _record(timelines[number_of[output.request_id]], output, now):
                        num_ended += 1
                        bar.update(1)
        return timelines

    def _send(self, request: TraceRequest, prompt: list[int]) -> str:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.num_new_tokens,
            ignore_eos=True,
            detokenize=self._detokenize,
        )
        adapter = None if request.adapter is None else self._names[request.adapter]
        return self._client.submit(prompt, params, adapter=adapter, stream=True)


def _record(timeline: Timeline, output: RequestOutput | RequestFailure, now: float) -> bool:
    """Add an output to its timeline; returns whether the request has ended."""
    if isinstance(output, RequestFailure):
        timeline.error = output.error
        return True
    num_tokens = len(output.outputs[0].token_ids)
    if num_tokens > timeline.num_tokens:
        timeline.arrivals.append((now, num_tokens))
    return output.finished


def check_complete(timelines: Sequence[Timeline], trace: Sequence[TraceRequest]) -> None:
    """Check that every request got all of its tokens.

    Raises:
        LoraplexError: the error of the first request that failed, or tokens are missing.
    """
    for number, (timeline, request) in enumerate(zip(timelines, trace, strict=True)):
        if timeline.error is not None:
            raise timeline.error
        if timeline.num_tokens != request.num_new_tokens:
            raise LoraplexError(
                f"request {number} got {timeline.num_tokens} tokens of {request.num_new_tokens}"
            )


def summarize(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Rates over the whole run, and latencies in milliseconds; failed requests are left out."""
    done = [t for t in timelines if t.error is None]
    seconds = max((t.arrivals[-1][0] for t in done), default=0.0)
    num_tokens = sum(t.num_tokens for t in done)
    gaps = [gap for t in done for gap in t.gaps_s()]
    return {
        "seconds": round(seconds, 4),
        "new_tokens": num_tokens,
        "new_tokens_per_s": round(num_tokens / seconds, 2) if seconds else 0.0,
        "requests_per_s": round(len(done) / seconds, 3) if seconds else 0.0,
        **percentiles("ttft_ms", [t.ttft_s for t in done]),
        **percentiles("inter_token_ms", gaps),
    }


def summarize_open_loop(timelines: Sequence[Timeline], ttft_objective_s: float) -> dict[str, Any]:
    """summarize(), the failures, and the share of requests whose first token came in time.

    A failed request counts as late.
    """
    attained = [t.error is None and t.ttft_s <= ttft_objective_s for t in timelines]
    errors = [t.error for t in timelines if t.error is not None]
    return {
        "num_failed": len(errors),
        "first_failure": str(errors[0]) if errors else None,
        "attainment": round(sum(attained) / len(attained), 4),
        **summarize(timelines),
    }


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in milliseconds; empty if there is no value."""
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, (50, 99))
    values = {"mean": np.mean(seconds), "p50": p50, "p99": p99}
    return {f"{name}_{key}": round(float(value) * 1e3, 3) for key, value in values.items()}


def step_times(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Time of a step while the batch is full, in milliseconds; empty if it never was.

    Takes the gaps between tokens from the last first token to the first end.
    """
    start = max(t.arrivals[0][0] for t in timelines)
    end = min(t.arrivals[-1][0] for t in timelines)
    gaps = [gap for t in timelines for gap in t.gaps_s(start, end)]
    if not gaps:
        return {}
    return {
        "step_ms": round(float(np.median(gaps)) * 1e3, 3),
        "step_ms_mean": round(float(np.mean(gaps)) * 1e3, 3),
        "step_ms_p99": round(float(np.percentile(gaps, 99)) * 1e3, 3),
    }


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median over the runs of each number that all of them have."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: round(float(np.median([row[key] for row in rows])), 4) for key in shared}
