"""Scrapes of a scheduler that a test drives, and their text as the official parser reads it."""

from itertools import chain
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from loraplex.engine.config import EngineConfig, ServerConfig
from loraplex.engine.frontend.statistics.request_histograms import RequestHistograms
from loraplex.entrypoints.metrics.exposition import render
from loraplex.entrypoints.metrics.scrape import Scrape, scrape_of
from loraplex.scheduler.adapters.tiers import adapters_by_tier

from helpers.scheduling.scheduler_harness import Harness

CONFIG = EngineConfig(server=ServerConfig(served_model_name="m"))

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Values by the name of a sample and its labels."""


def stats_of(harness: Harness) -> dict[str, Any]:
    """Returns what the message "stats" with by_tier is answered with."""
    scheduler = harness.scheduler
    registry = scheduler.adapters.registry
    slices = adapters_by_tier(scheduler.memory.adapters, registry, scheduler.waiting)
    return scheduler.stats() | {"adapters_by_tier": list(chain.from_iterable(slices))}


def scrape(
    stats: dict[str, Any],
    counts: RequestHistograms | None = None,
    *,
    stores: dict[str, Any] | None = None,
    cache_bytes: int | None = None,
) -> Scrape:
    counts = counts or RequestHistograms()
    return scrape_of(
        stats,
        config=CONFIG,
        histograms=counts.snapshot(),
        ends=counts.ends,
        stores=stores,
        cache_bytes=cache_bytes,
    )


def parse(text: str) -> Values:
    """Returns all samples; fails on one that comes twice."""
    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def values_of(found: Values, name: str, **labels: str) -> list[float]:
    """Returns the values of the samples of a name that have these labels among others."""
    return [v for (key, have), v in found.items() if key == name and labels.items() <= set(have)]


def value(found: Values, name: str, **labels: str) -> float:
    (only,) = values_of(found, name, **labels)
    return only


def labels_of(found: Values, name: str) -> list[dict[str, str]]:
    return [dict(labels) for key, labels in found if key == name]


def scraped(
    stats: dict[str, Any], counts: RequestHistograms | None = None, **options: Any
) -> Values:
    """Returns the samples of scrape()."""
    return parse(render(scrape(stats, counts, **options)).decode())
