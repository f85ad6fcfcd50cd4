"""Figures of a simulated run: attainment, service gaps and their bound."""

from collections.abc import Mapping, Sequence

from loraplex.scheduler.policies.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT

from sim_result import SimRequest, SimResult


def attainment(result: SimResult, slo_s: float) -> float:
    """Share of requests whose first token came in time. Those given up count as late."""
    in_time = [o.ttft_s is not None and o.ttft_s <= slo_s for o in result.timelines]
    return sum(in_time) / len(in_time)


def service_gaps(result: SimResult, weights: Mapping[str, float]) -> list[tuple[float, float]]:
    """(seconds, service of the first tenant minus the second's, each over its weight) by moment."""
    first, second = weights
    return [
        (m.time_s, m.service[first] / weights[first] - m.service[second] / weights[second])
        for m in result.moments
    ]


def max_service_gap(result: SimResult, weights: Mapping[str, float]) -> tuple[float, float]:
    """(largest change of the service gap, longest interval in seconds) while both are backlogged.

    Both tenants are backlogged in an interval if they have waiting requests throughout.
    """
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
    """VTC's bound on the service gap, 2 * max(w_p * L, w_q * M) (arXiv 2401.00588).

    L is the longest prompt, and M the most tokens that `num_seats` running requests can generate.
    """
    longest_prompt = max(request.num_prompt_tokens for request in trace)
    most_generated = num_seats * max(request.num_new_tokens for request in trace)
    return 2 * max(PROMPT_WEIGHT * longest_prompt, OUTPUT_WEIGHT * most_generated)
