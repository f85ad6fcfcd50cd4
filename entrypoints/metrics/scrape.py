"""Gathers the statistics from which all series of one scrape are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.scheduler.worker_protocol import WorkerReady

MAX_LISTED = 1000
"""Adapters that a scrape names, over all engines."""

ROUTER = "router"
"""The engine label of what a cluster's routers count."""

_TIERS = ("pages", "loading", "queued", "host")  # the order in which adapters are named


@dataclass(frozen=True, slots=True)
class Scrape:
    """The statistics of an engine, or of all engines of a cluster, at one time.

    Attributes:
        model_name: the base model's name.
        config: the configuration of every engine.
        engines: the statistics of each engine, by its label.
        adapters: rows of adapters_by_tier(), with the `engine` that has each, the fastest place
            first, at most MAX_LISTED.
        frontends: the engine label of what frontends count.
        histograms: those of RequestHistograms, over all frontends.
        ends: sequences that have ended, by finish reason, over all frontends.
        workers: of a single engine; none for a cluster.
        stores: StoreCounts.snapshot() over all frontends; None: there are no stores.
        cache_bytes: bytes of downloaded adapters; None: no store downloads any.
        engine_states: the number of a cluster's engines in each state.
        router: the counts of a cluster's routers together, by name; None for a single engine.
    """

    model_name: str
    config: EngineConfig
    engines: Mapping[str, Mapping[str, Any]]
    adapters: Sequence[Mapping[str, Any]]
    frontends: str
    histograms: Mapping[str, Any]
    ends: Mapping[str, int]
    workers: Sequence[WorkerReady] = ()
    engine_states: Mapping[str, int] | None = None
    router: Mapping[str, Any] | None = None
    stores: Mapping[str, Any] | None = None
    cache_bytes: int | None = None


def scrape_of(
    stats: Mapping[str, Any],
    *,
    config: EngineConfig,
    histograms: Mapping[str, Any],
    ends: Mapping[str, int],
    workers: Sequence[WorkerReady] = (),
    stores: Mapping[str, Any] | None = None,
    cache_bytes: int | None = None,
) -> Scrape:
    """Returns the scrape of an engine or a cluster.

    Args:
        stats: the reply to the message "stats" with `by_tier`.
    """
    is_cluster = "engines" in stats
    rows = [{"engine": "0", **row} for row in stats["adapters_by_tier"]]
    rows.sort(key=lambda row: _TIERS.index(row["tier"]))
    states: dict[str, int] = {}
    if is_cluster:
        for row in stats["router"]["engines"].values():
            states[row["state"]] = states.get(row["state"], 0) + 1
    return Scrape(
        model_name=config.server.served_model_name or config.model.model,
        config=config,
        engines=stats["engines"] if is_cluster else {"0": stats},
        adapters=rows[:MAX_LISTED],
        frontends=ROUTER if is_cluster else "0",
        histograms=histograms,
        ends=ends,
        workers=() if is_cluster else workers,
        engine_states=states if is_cluster else None,
        router=stats["router"] if is_cluster else None,
        stores=stores,
        cache_bytes=cache_bytes,
    )
