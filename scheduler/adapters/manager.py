"""Adapters as the user sees them: names, answers to commands, pins, and where each one is."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.memory.accounting.adapter_cache import CachedAdapter
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters.owners import AdapterOwners, check_owner
from loraplex.scheduler.adapters.pins import AdapterPins
from loraplex.scheduler.adapters.registry import AdapterRegistry
from loraplex.scheduler.adapters.usage_stats import UsageStats, first_tokens_by_us
from loraplex.scheduler.adapters.version import AdapterState, AdapterVersion, failure
from loraplex.scheduler.request import Request
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
)

ROWS_PER_SLICE = 8
"""Adapters described at one time: few enough that planning never waits for a list."""

logger = logging.getLogger("loraplex.scheduler")


@dataclass(slots=True)
class AdapterUpdate:
    """Result of load_adapter() or pin_adapter(), for the caller who gave `reply_key`."""

    reply_key: Hashable
    name: str
    error: str = ""
    error_code: str = ""
    adapter: dict[str, Any] = field(default_factory=dict)


class AdapterManager:
    """Joins the registry of names with the adapter cache, the user's pins and the statistics.

    An adapter leaves pages and host memory when no name and no unfinished request refers to it.
    """

    def __init__(
        self,
        *,
        memory: PageManager,
        max_slots: int,
        requests: Mapping[Hashable, Request],
        running: Iterable[Request],
        send: Callable[[InspectAdapter | DropAdapter], None],
        load: Callable[[AdapterVersion, float], None],
        clock: Callable[[], float],
        max_names_per_tenant: int,
    ) -> None:
        """`requests` are the unfinished ones; `load` begins a load, for which there is room."""
        self._memory = memory
        self._running = running
        self._send = send
        self._clock = clock
        self._updates: list[AdapterUpdate] = []
        self.pins = AdapterPins(memory=memory, max_slots=max_slots, requests=requests, load=load)
        self.usage_stats = UsageStats()
        self.registry = AdapterRegistry(
            max_pages=memory.blocks.num_usable,
            owners=AdapterOwners(max_names_per_tenant),
            send=send,
            on_unused=self._free_unused,
            on_replaced=self._on_replaced,
        )

    def on_accepted(self, request: Request) -> None:
        """Keep the adapters of a request until on_end(), and count it."""
        self.usage_stats.on_accepted(request)
        for binding in request.bindings:
            self.registry.bind(binding.version, request.arrival)

    def on_end(self, request: Request, now: float) -> None:
        """Count the end of a request. Its adapters may be freed."""
        self.usage_stats.on_end(request)
        for binding in request.bindings:
            self.registry.unbind(binding.version, now)

    def on_inspected(self, event: AdapterInspected) -> AdapterVersion:
        """Record an inspection and answer those who asked for it."""
        if event.content_hash:
            self._memory.adapters.set_on_host(event.content_hash, True)
        for warning in event.warnings:
            logger.warning("adapter %r: %s", event.name, warning)
        version, refusal = self.registry.on_inspected(event)
        if refusal and event.content_hash:
            self._free_unused(event.content_hash)
        self._answer_loads(version, refusal)
        if version.wants_pin:
            self._pin_inspected(version)
        return version

    def fail_waiting(self, command: InspectAdapter | LoadAdapter, why: str) -> Sequence[Hashable]:
        """Answer the loads and pins that wait for a command, which stays open, with an error.

        Returns:
            The events on which requests are parked that wait for it too.
        """
        if isinstance(command, LoadAdapter):
            return [command.content_hash]
        versions = self.registry.inspecting(command.name, command.path)
        for version in versions:
            self._answer_loads(version, failure(version, why=why))
            if version.pin_keys:
                self._answer_pins(version, failure(version, why=why))
        return versions

    def on_loaded(
        self, event: AdapterLoaded, version: AdapterVersion, waited: Iterable[Request]
    ) -> None:
        """Record the end of a load that the adapter cache knows of."""
        now = self._clock()
        self.usage_stats.on_loaded(event, version, waited)
        if event.error:
            if event.is_transient:
                self.registry.fail(version, event.error, is_transient=True)
            else:
                if version.is_pinned:
                    logger.warning("adapter %r is pinned no longer: %s", version.name, event.error)
                self.pins.unpin(version, now)
                self.registry.fail_load(version, event.error)
        else:
            version.error = ""
            self._memory.adapters.set_on_host(event.content_hash, True)
            self.pins.keep(now)
        self._free_unused(event.content_hash)

    def on_evicted(self, content_hash: str) -> None:
        """Record that the host store evicted an adapter."""
        self._memory.adapters.set_on_host(content_hash, False)

    def pin(self, name: str, reply_key: Hashable, tenant: str) -> None:
        """Pin what the name means; an update answers once its files are inspected."""
        check_owner(self.registry.find(name, tenant), tenant, "pin")
        version = self.registry.resolve(name, tenant=tenant)
        if version.state is AdapterState.READY:
            self._reply(reply_key, version, self.pins.pin(version))
            return
        version.wants_pin = True
        version.pin_keys.append(reply_key)
        self.registry.inspect_once(version)

    def unpin(self, name: str, tenant: str) -> AdapterVersion:
        version = self.registry.find(name, tenant)
        check_owner(version, tenant, "unpin")
        self.pins.unpin(version, self._clock())
        self._answer_pins(version, f"adapter {name!r} was unpinned while it was being read")
        return version

    def take_updates(self) -> list[AdapterUpdate]:
        """Returns the results of load_adapter() and pin_adapter() since the last call."""
        updates, self._updates = self._updates, []
        return updates

    def _reply(self, reply_key: Hashable, version: AdapterVersion, refusal: str) -> None:
        code, adapter = ("adapter", {}) if refusal else ("", self.describe(version, {}))
        self._updates.append(AdapterUpdate(reply_key, version.name, refusal, code, adapter))

    def _answer_loads(self, version: AdapterVersion, refusal: str) -> None:
        for reply_key in version.reply_keys:
            self._reply(reply_key, version, refusal)
        version.reply_keys.clear()

    def _pin_inspected(self, version: AdapterVersion) -> None:
        failed = version.state is not AdapterState.READY
        refusal = failure(version) if failed else self.pins.pin(version)
        if refusal and not version.pin_keys:
            logger.warning("%s; its name was pinned, and is no longer", refusal)
        self._answer_pins(version, refusal)

    def _answer_pins(self, version: AdapterVersion, refusal: str) -> None:
        version.wants_pin = False
        for reply_key in version.pin_keys:
            self._reply(reply_key, version, refusal)
        version.pin_keys.clear()

    def _on_replaced(self, version: AdapterVersion, successor: AdapterVersion | None) -> None:
        """Give the pin of a name to its next version, if that fits the share."""
        was_pinned = version.is_pinned or version.wants_pin
        self.pins.unpin(version, self._clock())
        if successor is None:
            self._answer_pins(version, f"adapter {version.name!r} was unloaded")
        elif was_pinned:
            successor.wants_pin = True
            successor.pin_keys += version.pin_keys
            version.wants_pin = False
            version.pin_keys.clear()
            if successor.state is AdapterState.READY:
                self._pin_inspected(successor)
            elif successor.state is AdapterState.REGISTERED:
                self.registry.inspect_once(successor)

    def _free_unused(self, content_hash: str) -> None:
        """Free an adapter that no name and no request refers to.

        One that is loading stays; on_loaded() calls this again.
        """
        if self.registry.with_hash(content_hash):
            return
        adapter = self._memory.adapters.get(content_hash)
        if adapter is not None:
            if not adapter.is_idle:
                return
            self._memory.evict_adapter(content_hash)
        self._memory.adapters.set_on_host(content_hash, False)
        self._send(DropAdapter(content_hash))

    def describe_all(self) -> Iterator[list[dict[str, Any]]]:
        """Yields every named adapter as plain values, ROWS_PER_SLICE at a time.

        A slice is true when it is taken. Names that go before their slice are left out; names that
        come after the first slice are not in it.
        """
        names = self.registry.names()
        for first in range(0, len(names), ROWS_PER_SLICE):
            num_running = _count_running(self._running)
            versions = map(self.registry.current, names[first : first + ROWS_PER_SLICE])
            yield [self.describe(version, num_running) for version in versions if version]

    def describe_one(self, name: str, tenant: str = "") -> dict[str, Any]:
        """The adapter that a tenant's name means as plain values; RequestRefused if unknown."""
        num_running = _count_running(self._running)
        return self.describe(self.registry.find(name, tenant), num_running)

    def describe(
        self, version: AdapterVersion, num_running: Mapping[AdapterVersion, int]
    ) -> dict[str, Any]:
        """Describe a named adapter; `num_running` counts running requests by version."""
        adapter = self._memory.adapters.get(version.content_hash) if version.content_hash else None
        is_resident = adapter is not None and not adapter.is_loading
        on_host = self._memory.adapters.is_on_host(version.content_hash)
        last_use = self._clock() if version.num_requests else version.last_use
        return {
            "name": version.name,
            "path": "" if version.source.is_memory else version.path,
            "owner": version.owner,
            "is_from_store": version.source.is_from_store,
            "state": version.state.value,
            "error": version.error,
            "content_hash": version.content_hash,
            "num_pages": version.num_pages,
            "num_bytes": version.num_bytes,
            "kind": version.kind,
            "max_rank": version.max_rank,
            "modules": list(version.modules),
            "warnings": list(version.warnings),
            "invocation_tokens": list(version.invocation_tokens),
            "tier": "pages" if is_resident else "host" if on_host else _source_tier(version),
            "residency": _residency(adapter),
            "pinned": version.is_pinned or version.wants_pin,
            "num_requests": version.num_requests,
            "num_running": num_running.get(version, 0),
            "num_users": self._num_users(adapter) if adapter else 0,
            "num_waiting": version.num_requests - num_running.get(version, 0),
            "seconds_since_use": self._clock() - last_use if last_use >= 0 else None,
            "usage": version.usage.snapshot() if version.usage else {},
        }

    def describe_resident(self) -> Iterator[list[dict[str, Any]]]:
        """Yields every content in pages as plain values, ROWS_PER_SLICE at a time."""
        hashes = [adapter.content_hash for adapter in self._memory.adapters]
        for first in range(0, len(hashes), ROWS_PER_SLICE):
            adapters = map(self._memory.adapters.get, hashes[first : first + ROWS_PER_SLICE])
            yield [self._describe_content(adapter) for adapter in adapters if adapter]

    def _describe_content(self, adapter: CachedAdapter) -> dict[str, Any]:
        versions = self.registry.with_hash(adapter.content_hash)
        return {
            "content_hash": adapter.content_hash,
            "names": [version.name for version in versions],
            "kind": versions[0].kind if versions else "",
            "num_bytes": versions[0].num_bytes if versions else 0,
            "num_pages": len(adapter.page_ids),
            "residency": _residency(adapter),
            "pinned": self.pins.is_reserved(adapter.content_hash),
            "adapter_slot": adapter.slot,
            "num_users": self._num_users(adapter),
            "seconds_since_use": self._idle_seconds(adapter),
        }

    def stats(self) -> dict[str, Any]:
        """Return counts over all adapters, and those of the base model."""
        return {
            "registered_adapters": len(self.registry),
            "host_adapters": self._memory.adapters.num_on_host,
            "pinned_adapters": len(self.pins),
            "pages_pinned": self.pins.num_pages,
            "adapter_load_seconds": {
                tier: histogram.snapshot()
                for tier, histogram in self.usage_stats.load_seconds.items()
            },
            "adapter_usage": self.usage_stats.adapters.snapshot(),
            "base_usage": self.usage_stats.base.snapshot(),
            "first_tokens_by_us": first_tokens_by_us(
                [self.usage_stats.base, self.usage_stats.adapters]
            ),
        }

    def _num_users(self, adapter: CachedAdapter) -> int:
        return adapter.num_reservations - self.pins.is_reserved(adapter.content_hash)

    def _idle_seconds(self, adapter: CachedAdapter) -> float:
        return 0.0 if self._num_users(adapter) else self._clock() - adapter.last_use


def _count_running(running: Iterable[Request]) -> Counter[AdapterVersion]:
    return Counter(binding.version for request in running for binding in request.bindings)


def _source_tier(version: AdapterVersion) -> str:
    return "memory" if version.source.is_memory else "disk"


def _residency(adapter: CachedAdapter | None) -> str:
    if adapter is None:
        return "none"
    return "loading" if adapter.is_loading else "resident"
