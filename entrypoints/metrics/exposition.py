"""Writes a scrape in Prometheus' text format."""

from collections.abc import Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from loraplex.entrypoints.metrics.catalogue import SERIES
from loraplex.entrypoints.metrics.scrape import Scrape
from loraplex.entrypoints.metrics.series import Series

CONTENT_TYPE = CONTENT_TYPE_LATEST


class ScrapeCollector(Collector):
    """Offers the series of one scrape to prometheus_client."""

    def __init__(self, scrape: Scrape, series: Iterable[Series] = SERIES) -> None:
        self._scrape = scrape
        self._series = series

    def collect(self) -> Iterator[Metric]:
        for series in self._series:
            yield _family(series, self._scrape)


def render(scrape: Scrape) -> bytes:
    """Returns the text of all series that have samples."""
    return generate_latest(ScrapeCollector(scrape))


def _family(series: Series, scrape: Scrape) -> Metric:
    family = Metric(series.name, series.help, series.kind)
    for labels, value in series.samples(scrape):
        if series.kind == "histogram":
            for bound, count in value["buckets"].items():
                family.add_sample(f"{series.name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{series.name}_count", labels, value["count"])
            family.add_sample(f"{series.name}_sum", labels, value["sum"])
        else:
            family.add_sample(series.text_name, labels, value)
    return family
