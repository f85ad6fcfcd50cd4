"""The definition of a series of metrics, and ways to read its values from a scrape."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.entrypoints.metrics.scrape import ROUTER, Scrape

MAX_VALUES = 64
"""Values of one label for which a series has samples; the rest is summed as "other"."""

Sample = tuple[dict[str, str], Any]
"""Labels besides the model's name, and the value: a number, or BucketCounts.snapshot()."""

Reader = Callable[[Scrape], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class Series:
    """One name of metrics.

    Attributes:
        name: a counter's without the "_total" that the text has.
        kind: "gauge", "counter" or "histogram".
        read: returns the samples of a scrape.
        labels: names of its labels.
    """

    name: str
    kind: str
    help: str
    read: Reader
    labels: tuple[str, ...] = ("model_name", "engine")

    @property
    def text_name(self) -> str:
        """The name in the text of a scrape."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def samples(self, scrape: Scrape) -> Iterator[Sample]:
        """Yields all labels and the value of each sample."""
        for labels, value in self.read(scrape):
            if "model_name" in self.labels:
                labels = {"model_name": scrape.model_name, **labels}
            yield labels, value


def gauge(name: str, help: str, read: Reader, *labels: str) -> Series:
    return Series(name, "gauge", help, read, ("model_name", "engine", *labels))


def counter(name: str, help: str, read: Reader, *labels: str) -> Series:
    return Series(name, "counter", help, read, ("model_name", "engine", *labels))


def histogram(name: str, help: str, read: Reader, *labels: str) -> Series:
    return Series(name, "histogram", help, read, ("model_name", "engine", *labels))


def each_engine(value: Callable[[Mapping[str, Any]], Any]) -> Reader:
    """Reads one value of each engine's statistics."""
    return lambda scrape: (({"engine": k}, value(stats)) for k, stats in scrape.engines.items())


def stat(key: str, *, scale: float = 1) -> Reader:
    """Reads a number of each engine's statistics, times `scale`."""
    return each_engine(lambda stats: stats[key] if scale == 1 else stats[key] * scale)


def of_router(key: str) -> Reader:
    """Reads a count of a cluster's routers; a single engine has none."""
    return lambda scrape: [({"engine": ROUTER}, scrape.router[key])] if scrape.router else []


def by_label(label: str, values: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Reader:
    """Reads several values of each engine's statistics; their keys are values of `label`."""

    def read(scrape: Scrape) -> Iterator[Sample]:
        for engine, stats in scrape.engines.items():
            for key, value in bounded(values(stats)).items():
                yield {"engine": engine, label: key}, value

    return read


def bounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the first MAX_VALUES values, and the sum of the others as "other"."""
    items = list(values.items())
    kept = dict(items[:MAX_VALUES])
    if len(items) > MAX_VALUES:
        kept["other"] = sum(value for _, value in items[MAX_VALUES:])
    return kept
