"""Placement policies: each chooses one of the engines that can take a request."""

from collections.abc import Callable, Sequence
from random import Random

from loraplex.scheduler.placement.engine_summary import EngineSummary
from loraplex.scheduler.placement.placement_request import PlacementRequest
from loraplex.scheduler.placement.rendezvous import rank_engines

LOAD_BOUND = 1.5  # times the mean fill
LIGHT_FILL = 0.125  # an engine filled less is never too loaded for affinity
LATE_SHARE = 0.005  # of the objective: an engine that is later than the soonest by more is too busy
NUM_CHOICES = 3  # engines, at least, that a load chooses from

Policy = Callable[[PlacementRequest, Sequence[EngineSummary], Random], EngineSummary]


def affinity(
    request: PlacementRequest, able: Sequence[EngineSummary], random: Random
) -> EngineSummary:
    """Takes the soonest engine that holds the adapter; loads it elsewhere if all these are busy.

    A load chooses from the first engines in the adapter's rendezvous order (the power of few
    choices: Mitzenmacher, 2001). These compete with the holders, too, while the adapter has fewer
    holders than its demand needs. Requests of the base model may go to any engine.
    """
    engines = {engine.engine_id: engine for engine in able}
    seconds = _first_token_seconds(request, able)
    candidates = list(seconds)
    if home := request.home or request.content_hash:
        holders = [e.engine_id for e in able if e.holds(request.content_hash, home)]
        candidates = [engine_id for engine_id in holders if engine_id in seconds]
        if not candidates or len(holders) < request.num_candidates:
            candidates += rank_engines(home, seconds)[: max(NUM_CHOICES, request.num_candidates)]
    return engines[min(candidates, key=lambda key: (seconds[key], engines[key].occupancy))]


def _first_token_seconds(
    request: PlacementRequest, able: Sequence[EngineSummary]
) -> dict[str, float]:
    """Predicts the first token on each engine that is not too full, and not late beside the best.

    Consistent hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018
    (arXiv 1608.01350).
    """
    mean = sum(engine.fill for engine in able) / len(able)
    bound = max(LIGHT_FILL, LOAD_BOUND * mean)
    light = [engine for engine in able if engine.fill <= bound]
    seconds = {engine.engine_id: request.first_token_seconds(engine) for engine in light}
    latest = min(seconds.values()) + LATE_SHARE * request.objective_s
    return {key: wait for key, wait in seconds.items() if wait <= latest}


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
