"""Makes the requests of a benchmark.

The traces are S-LoRA's (arXiv 2311.03285), the popularities Punica's (arXiv 2310.18547).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loraplex.entrypoints.bench.names import POPULARITIES, POWER

SEED = 42
SKEW = 1.5


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request; `adapter` counts from 0 and is None for the base model."""

    adapter: int | None
    num_prompt_tokens: int
    num_new_tokens: int
    arrival_s: float = 0.0  # after the start of the run


def make_trace(
    num_requests: int,
    num_adapters: int,
    *,
    popularity: str = POWER,
    alpha: float = 1.0,
    lengths: tuple[int, int] = (8, 512),
    rate: float | None = None,
    cv: float = 1.0,
    seed: int = SEED,
) -> list[TraceRequest]:
    """Make a trace in order of arrival. Lengths and arrivals do not depend on the adapters.

    Args:
        num_adapters: 0 is the base model alone.
        popularity: POWER draws each adapter as floor(num_adapters * power(alpha)), uniform at
            alpha 1; one of POPULARITIES deals the adapters and shuffles them.
        lengths: bounds [low, high) of a prompt and of an answer, in tokens, drawn independently.
        rate: requests a second, with Gamma gaps of mean 1/rate and coefficient of variation
            `cv`; None sends all at once (a closed run).
    """
    length_rng, adapter_rng, gap_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    prompts, answers = length_rng.integers(*lengths, size=(2, num_requests)).tolist()
    arrivals = [0.0] * num_requests
    if rate is not None:
        gaps = gap_rng.gamma(1 / cv**2, cv**2 / rate, num_requests)
        arrivals = np.cumsum(gaps).tolist()
    adapters: Sequence[int | None] = [None] * num_requests
    if num_adapters and popularity == POWER:
        draws = adapter_rng.power(alpha, num_requests)  # in [0, 1], 1.0 included
        adapters = np.minimum((draws * num_adapters).astype(int), num_adapters - 1).tolist()
    elif num_adapters:
        dealt = adapters_of_rows(popularity, num_requests, num_adapters)
        adapters = adapter_rng.permutation(dealt).tolist()
    columns = zip(adapters, prompts, answers, arrivals, strict=True)
    return [TraceRequest(*fields) for fields in columns]


def closed_batch(
    num_rows: int, popularity: str | None, *, num_prompt_tokens: int, num_new_tokens: int
) -> list[TraceRequest]:
    """Make requests of one length, sent at once. A popularity of None is the base model."""
    adapters: Sequence[int | None] = [None] * num_rows
    if popularity is not None:
        adapters = adapters_of_rows(popularity, num_rows, num_rows)
    return [TraceRequest(adapter, num_prompt_tokens, num_new_tokens) for adapter in adapters]


def adapters_of_rows(popularity: str, num_rows: int, num_adapters: int) -> list[int]:
    """Adapter of each row. With as many adapters as rows these are Punica's four cases."""
    if popularity == "distinct":
        return [row % num_adapters for row in range(num_rows)]
    if popularity == "uniform":
        return [row % math.ceil(math.sqrt(num_adapters)) for row in range(num_rows)]
    if popularity == "skewed":
        weights = SKEW ** -np.arange(num_adapters, dtype=float)
        edges = np.ceil(np.cumsum(weights / weights.sum()) * num_rows - 1e-9)
        return [int(np.searchsorted(edges, row, side="right")) for row in range(num_rows)]
    if popularity == "identical":
        return [0] * num_rows
    raise ValueError(f"popularity must be one of {POPULARITIES}, got {popularity!r}")


def full_steps_trace(
    trace: Sequence[TraceRequest], *, max_num_seqs: int, max_num_batched_tokens: int
) -> list[TraceRequest]:
    """Make two steps of prefill, as full as the limits allow.

    Every prompt is as long as the trace's longest and has an answer of one token.
    """
    longest = max(request.num_prompt_tokens for request in trace)
    num_rows = 2 * min(max_num_seqs, math.ceil(max_num_batched_tokens / longest))
    return [TraceRequest(trace[i % len(trace)].adapter, longest, 1) for i in range(num_rows)]


def warm_up_trace(
    trace: Sequence[TraceRequest], *, at_least: int, max_new_tokens: int = 16
) -> list[TraceRequest]:
    """Take the first `at_least` requests and one of each adapter, all at once, with short answers.

    The answers differ in length, so that prompts join batches that already decode.
    """
    seen: set[int | None] = set()
    kept = []
    for index, request in enumerate(trace):
        if index < at_least or request.adapter not in seen:
            short = min(1 + index % max_new_tokens, request.num_new_tokens)
            kept.append(replace(request, num_new_tokens=short, arrival_s=0.0))
            seen.add(request.adapter)
    return kept


def make_prompts(trace: Sequence[TraceRequest], vocab_size: int, *, run: int) -> list[list[int]]:
    """Random token ids by request. Each `run` has others, so the prefix cache never serves them."""
    rng = np.random.default_rng((SEED, run))
    return [rng.integers(0, vocab_size, r.num_prompt_tokens).tolist() for r in trace]
