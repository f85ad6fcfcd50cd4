"""Offers an engine's statistics as vLLM's metrics; classes and names are vLLM's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.metrics.scrape import scrape_of
from loraplex.entrypoints.metrics.vllm_series import VLLM_SERIES
from loraplex.scheduler.worker_protocol import WorkerReady


@dataclass(frozen=True, slots=True)
class Metric:
    """A named value. `labels` tell apart metrics of one name."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """A number that may grow and shrink."""

    value: float


@dataclass(frozen=True, slots=True)
class Vector(Metric):
    """An ordered list of counters. No metric of loraplex is one."""

    values: list[int]


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """Values counted in buckets.

    A bucket's key is its upper bound as text, the last one "+Inf". Its value counts everything up
    to that bound.
    """

    count: int
    sum: float
    buckets: dict[str, int]


_KINDS = {"gauge": Gauge, "counter": Counter}


def metrics_of(
    stats: Mapping[str, Any], *, config: EngineConfig, workers: Sequence[WorkerReady] = ()
) -> list[Metric]:
    """Returns the metrics of an engine that vLLM has too.

    Args:
        stats: what Client.stats(by_tier=True) returns.
    """
    frontend = stats["frontend"]
    scrape = scrape_of(
        stats,
        config=config,
        histograms=frontend["histograms"],
        ends=frontend["ends"],
        workers=workers,
    )
    found: list[Metric] = []
    for series in VLLM_SERIES:
        for labels, value in series.samples(scrape):
            if series.kind == "histogram":
                found.append(Histogram(series.name, labels, **value))
            else:
                found.append(_KINDS[series.kind](series.name, labels, value))
    return found
