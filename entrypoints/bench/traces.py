"""Requests to measure with: the trace of S-LoRA (arXiv 2311.03285) and Punica's popularities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loraplex.entrypoints.bench.names import POPULARITIES, POWER

SEED = 42
SKEW = 1.5
MAX_PUNICA_PROMPT, MAX_PUNICA_ANSWER = 255, 768


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
    """A trace in order of arrival; lengths and arrivals do not depend on the adapters.

    Args:
        num_adapters: 0 is the base model alone.
        popularity: POWER draws each adapter as floor(num_adapters * power(alpha)), uniform at
            alpha 1; one of POPULARITIES deals the adapters and shuffles them.
        lengths: bounds [low, high) of prompt and answer, drawn apart.
        rate: requests a second, with Gamma gaps of mean 1/rate and coefficient of variation
            `cv`; None: all at once (a closed run).
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
    """Requests of one length that are sent at once; None is the base model."""
    adapters: Sequence[int | None] = [None] * num_rows
    if popularity is not None:
        adapters = adapters_of_rows(popularity, num_rows, num_rows)
    return [TraceRequest(adapter, num_prompt_tokens, num_new_tokens) for adapter in adapters]


def adapters_of_rows(popularity: str, num_rows: int, num_adapters: int) -> list[int]:
    """The adapter of each row; with as many adapters as rows these are Punica's four cases."""
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


def punica_trace(num_requests: int, popularity: str | None) -> list[TraceRequest]:
    """Punica's closed batch (arXiv 2310.18547); None is the base model.

    The paper takes lengths from ShareGPT, which is not ours to ship, and says that 1,000 requests
    generate about 101k tokens. Stand-in: prompts are log-normal as in the authors' published
    benchmark (sigma 0.8, scale 18, shifted by -1), answers log-normal with the same sigma and a
    mean of 101 tokens. Lengths do not depend on the popularity.
    """
    length_rng, adapter_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(SEED).spawn(2)
    )
    prompts = length_rng.lognormal(math.log(18.0), 0.8, num_requests) - 1
    answers = length_rng.lognormal(math.log(101.0) - 0.8**2 / 2, 0.8, num_requests)
    adapters: Sequence[int | None] = [None] * num_requests
    if popularity is not None:
        dealt = adapters_of_rows(popularity, num_requests, num_requests)
        adapters = adapter_rng.permutation(dealt).tolist()
    columns = zip(
        adapters,
        prompts.round().clip(1, MAX_PUNICA_PROMPT).astype(int).tolist(),
        answers.round().clip(1, MAX_PUNICA_ANSWER).astype(int).tolist(),
        strict=True,
    )
    return [TraceRequest(*fields) for fields in columns]


def full_steps_trace(
    trace: Sequence[TraceRequest], *, max_num_seqs: int, max_num_batched_tokens: int
) -> list[TraceRequest]:
    """Prompts as long as the trace's longest, for its first adapters in turn, with answers of one
    token: two steps of prefill alone, as full as the limits let them be."""
    longest = max(request.num_prompt_tokens for request in trace)
    num_rows = 2 * min(max_num_seqs, math.ceil(max_num_batched_tokens / longest))
    return [TraceRequest(trace[i % len(trace)].adapter, longest, 1) for i in range(num_rows)]


def warm_up_trace(
    trace: Sequence[TraceRequest], *, at_least: int, max_new_tokens: int = 16
) -> list[TraceRequest]:
    """The first `at_least` requests and one of each adapter, all at once, with short answers.

    The answers differ in length, so that prompts join batches that decode already.
    """
    seen: set[int | None] = set()
    chosen = []
    for index, request in enumerate(trace):
        if index < at_least or request.adapter not in seen:
            short = min(1 + index % max_new_tokens, request.num_new_tokens)
            chosen.append(replace(request, num_new_tokens=short, arrival_s=0.0))
            seen.add(request.adapter)
    return chosen


def make_prompts(trace: Sequence[TraceRequest], vocab_size: int, *, run: int) -> list[list[int]]:
    """Random token ids; another `run` has others, so that no prefix cache answers for it."""
    rng = np.random.default_rng((SEED, run))
    return [rng.integers(0, vocab_size, r.num_prompt_tokens).tolist() for r in trace]
