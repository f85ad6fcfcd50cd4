"""Lists the names of adapters by the place where they are, for metrics."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from loraplex.memory.accounting.adapter_cache import AdapterCache
from loraplex.scheduler.adapters.registry import AdapterRegistry
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.request import Request

MAX_NAMES = 1000
"""Names in a list. It bounds the size of a scrape."""

MAX_WAITING = 1024
"""Waiting requests that are looked at for their adapters, the oldest first."""

NAMES_PER_SLICE = 32
"""Names listed at one time: few enough that planning never waits for a list."""


def adapters_by_tier(
    cache: AdapterCache, registry: AdapterRegistry, waiting: Iterable[Request]
) -> Iterator[list[dict[str, Any]]]:
    """Yields rows of `name`, `tier` and `pinned`, NAMES_PER_SLICE at a time, at most MAX_NAMES.

    A name comes once. Its tier is "pages", "loading" (into pages), "queued" (a request waits for
    it), or "host"; they come in this order. Names in none of these places are left out. A slice is
    true when it is taken.
    """
    rows = islice(_rows(cache, registry, waiting), MAX_NAMES)
    while part := list(islice(rows, NAMES_PER_SLICE)):
        yield part


def _rows(
    cache: AdapterCache, registry: AdapterRegistry, waiting: Iterable[Request]
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for version, tier in _versions(cache, registry, waiting):
        if version.name not in seen:
            seen.add(version.name)
            pinned = version.is_pinned or version.wants_pin
            yield {"name": version.name, "tier": tier, "pinned": pinned}


def _versions(
    cache: AdapterCache, registry: AdapterRegistry, waiting: Iterable[Request]
) -> Iterator[tuple[AdapterVersion, str]]:
    in_pages = sorted(cache, key=lambda adapter: adapter.is_loading)
    for adapter in in_pages:
        if cache.get(adapter.content_hash) is adapter:  # it is still there
            tier = "loading" if adapter.is_loading else "pages"
            for version in tuple(registry.with_hash(adapter.content_hash)):
                yield version, tier
    for request in list(islice(waiting, MAX_WAITING)):
        for binding in request.bindings:
            yield binding.version, "queued"
    for content_hash in cache.on_host(MAX_NAMES):
        for version in tuple(registry.with_hash(content_hash)):
            yield version, "host"
