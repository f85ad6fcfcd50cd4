"""Chooses the engine of a request from the engines' summaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from loraplex.scheduler.placement.engine_summary import EngineSummary
from loraplex.scheduler.placement.placement_policies import POLICIES
from loraplex.scheduler.placement.placement_request import PlacementRequest

MAX_AGE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PlacementDecision:
    """The chosen engine and the seconds until its first token, as predicted."""

    engine_id: str
    first_token_seconds: float
    load_seconds: float


def place(
    request: PlacementRequest, summaries: Sequence[EngineSummary], policy: str, random: Random
) -> PlacementDecision | None:
    """Returns the engine for a request, or None while no engine can take it.

    Engines that are suspect, draining or full are never chosen. Raises ValueError for an unknown
    policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown placement policy {policy!r}: use one of {', '.join(POLICIES)}")
    able = [engine for engine in summaries if _can_take(engine, request.pages)]
    if not able:
        return None
    chosen = POLICIES[policy](request, able, random)
    return PlacementDecision(
        chosen.engine_id,
        request.first_token_seconds(chosen),
        chosen.seconds_to_load(request.content_hash),
    )


def _can_take(engine: EngineSummary, pages: int) -> bool:
    """Returns whether an engine can start a request of `pages` pages now."""
    return not (engine.draining or engine.is_suspect(MAX_AGE_SECONDS) or engine.is_full(pages))
