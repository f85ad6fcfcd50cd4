"""The series of adapter stores. They have samples where the engine has stores."""

from collections.abc import Iterator, Mapping
from typing import Any

from loraplex.entrypoints.metrics.scrape import Scrape
from loraplex.entrypoints.metrics.series import Reader, Sample, counter, gauge, histogram


def _stores(key: str) -> Reader:
    def read(scrape: Scrape) -> Iterator[Sample]:
        if scrape.stores is not None:
            yield {"engine": scrape.frontends}, scrape.stores[key]

    return read


def _lookups(scrape: Scrape) -> Iterator[Sample]:
    stores: Mapping[str, Any] = scrape.stores or {"lookups": {}}
    for result, count in stores["lookups"].items():
        yield {"engine": scrape.frontends, "result": result}, count


def _cache(scrape: Scrape) -> Iterator[Sample]:
    if scrape.cache_bytes is not None:
        limit = scrape.config.store.adapter_cache_bytes
        for kind, value in (("used", scrape.cache_bytes), ("limit", limit)):
            yield {"engine": scrape.frontends, "kind": kind}, value


STORE_SERIES = (
    counter(
        "loraplex_store_lookups",
        "Names that the adapter stores were asked for, by result: found, missing, refused (the "
        "adapter cannot be used), unavailable (a store did not answer, or there was no room).",
        _lookups,
        "result",
    ),
    histogram(
        "loraplex_store_download_seconds",
        "Time of a complete download of an adapter.",
        _stores("download_seconds"),
    ),
    counter(
        "loraplex_store_download_bytes",
        "Bytes of complete downloads.",
        _stores("download_bytes"),
    ),
    counter(
        "loraplex_store_download_failures",
        "Downloads that ended before they were complete.",
        _stores("failed_downloads"),
    ),
    gauge(
        "loraplex_store_cache_bytes",
        "Bytes in the cache of downloads, those that run included: used, and limit. Engines that "
        "share the cache show the same.",
        _cache,
        "kind",
    ),
    counter(
        "loraplex_store_cache_evictions",
        "Downloaded adapters that this engine removed from the cache to make room.",
        _stores("evictions"),
    ),
)
