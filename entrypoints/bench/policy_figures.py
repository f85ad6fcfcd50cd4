"""What is read off a simulated run: attainment, service gaps and their bound."""

from collections.abc import Mapping, Sequence

from loraplex.entrypoints.bench.simulate import SimRequest, SimResult
from loraplex.scheduler.policies.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT


def attainment(result: SimResult, slo_s: float) -> float:
    """Share of all requests, those given up included, whose first token came in time."""
    in_time = [o.ttft_s is not None and o.ttft_s <= slo_s for o in result.outcomes]
    return sum(in_time) / len(in_time)


def service_gaps(result: SimResult, weights: Mapping[str, float]) -> list[tuple[float, float]]:
    """(seconds, service of the first tenant less that of the second, each by its weight)."""
    first, second = weights
    return [
        (m.time_s, m.service[first] / weights[first] - m.service[second] / weights[second])
        for m in result.moments
    ]


def max_service_gap(result: SimResult, weights: Mapping[str, float]) -> tuple[float, float]:
    """The largest difference of service over any interval in which both tenants had requests
    waiting throughout, and the seconds of the longest such interval."""
    worst = longest = 0.0
    begin: float | None = None
    low = high = 0.0
    for moment, (now, gap) in zip(result.moments, service_gaps(result, weights), strict=True):
        if min(moment.num_waiting.values()) == 0:
            begin = None
            continue
        if begin is None:
            begin, low, high = now, gap, gap
        low, high = min(low, gap), max(high, gap)
        worst, longest = max(worst, high - low), max(longest, now - begin)
    return worst, longest


def vtc_bound(trace: Sequence[SimRequest], *, num_seats: int) -> float:
    """2 * max(w_p * L, w_q * M): L the longest prompt, M what the running requests may generate,
    which no page pool of their size exceeds."""
    longest_prompt = max(request.num_prompt_tokens for request in trace)
    most_generated = num_seats * max(request.num_new_tokens for request in trace)
    return 2 * max(PROMPT_WEIGHT * longest_prompt, OUTPUT_WEIGHT * most_generated)
