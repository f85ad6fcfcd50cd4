"""Placement policies: each chooses one of the engines that can take a request."""

from collections.abc import Callable, Sequence
from random import Random

from loraplex.scheduler.placement.engine_summary import EngineSummary
from loraplex.scheduler.placement.placement_request import PlacementRequest
from loraplex.scheduler.placement.rendezvous import rank_engines

LOAD_BOUND = 1.25  # times the mean load
LIGHT_FILL = 0.125  # an engine filled less is never too loaded for affinity
LATE_SHARE = 0.01  # of the objective: an engine that is later than the soonest by more is too busy

Policy = Callable[[PlacementRequest, Sequence[EngineSummary], Random], EngineSummary]


def affinity(
    request: PlacementRequest, able: Sequence[EngineSummary], random: Random
) -> EngineSummary:
    """Takes the soonest of the adapter's candidates, in rendezvous order under a load bound.

    Consistent hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018
    (arXiv 1608.01350). Requests of the base model may go to any engine.
    """
    mean = sum(engine.fill for engine in able) / len(able)
    bound = max(LIGHT_FILL, LOAD_BOUND * mean)
    light = {engine.engine_id: engine for engine in able if engine.fill <= bound}
    seconds = {key: request.first_token_seconds(engine) for key, engine in light.items()}
    latest = min(seconds.values()) + LATE_SHARE * request.objective_s
    ranked = [key for key in light if seconds[key] <= latest]
    if home := request.home or request.content_hash:
        ranked = rank_engines(home, ranked)[: max(1, request.num_candidates)]
    return light[min(ranked, key=lambda key: (seconds[key], light[key].occupancy))]


def consolidate(
    request: PlacementRequest, able: Sequence[EngineSummary], random: Random
) -> EngineSummary:
    """Takes the fullest engine that keeps the objective (Punica, section 5; arXiv 2310.18547).

    Where none keeps it, takes the one with the soonest first token.
    """
    in_time = [e for e in able if request.first_token_seconds(e) <= request.objective_s]
    if in_time:
        return max(in_time, key=lambda engine: (engine.occupancy, engine.engine_id))
    return min(able, key=request.first_token_seconds)


def least_loaded(
    request: PlacementRequest, able: Sequence[EngineSummary], random: Random
) -> EngineSummary:
    """Takes the engine with the fewest unfinished requests."""
    return min(able, key=lambda engine: (engine.occupancy, engine.waiting_tokens))


def choose_randomly(
    request: PlacementRequest, able: Sequence[EngineSummary], random: Random
) -> EngineSummary:
    """Takes any engine."""
    return random.choice(able)


POLICIES: dict[str, Policy] = {
    "affinity": affinity,
    "consolidate": consolidate,
    "least_loaded": least_loaded,
    "random": choose_randomly,
}
