"""Adapters as the user sees them: names, outcomes of commands, pins, and what is where."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from loraplex.memory.adapter_cache import CachedAdapter, Residency
from loraplex.memory.logical import LogicalMemory
from loraplex.scheduler.adapter_pins import AdapterPins
from loraplex.scheduler.adapters import (
    Adapter,
    AdapterRegistry,
    AdapterState,
    AdapterUpdate,
    failure,
)
from loraplex.scheduler.plan import AdapterInspected, AdapterLoaded, DropAdapter, InspectAdapter
from loraplex.scheduler.request import Request
from loraplex.scheduler.service import ServiceBook

logger = logging.getLogger("loraplex.scheduler")


class AdapterDesk:
    """Joins the registry of names with the cache of contents, the user's pins and the statistics.

    A content leaves pages and host memory when no name and no unfinished request refers to it.
    """

    def __init__(
        self,
        *,
        memory: LogicalMemory,
        max_slots: int,
        requests: Mapping[Hashable, Request],
        send: Callable[[InspectAdapter | DropAdapter], None],
        load: Callable[[Adapter, float], None],
        clock: Callable[[], float],
    ) -> None:
        """`requests` are the unfinished ones; `load` begins to load an adapter into free pages."""
        self._memory = memory
        self._send = send
        self._clock = clock
        self._updates: list[AdapterUpdate] = []
        self.pins = AdapterPins(memory=memory, max_slots=max_slots, requests=requests, load=load)
        self.service = ServiceBook()
        self.registry = AdapterRegistry(
            max_pages=memory.blocks.num_usable,
            send=send,
            orphan=self._release_unwanted,
            retire=self._on_retired,
        )

    def on_inspected(self, event: AdapterInspected) -> Adapter:
        """Record an inspection and answer whoever asked for it."""
        if event.content_hash:
            self._memory.adapters.set_in_host(event.content_hash, True)
        record, refusal = self.registry.on_inspected(event)
        if refusal and event.content_hash:
            self._release_unwanted(event.content_hash)
        for reply_key in record.reply_keys:
            self._reply(reply_key, record, refusal)
        record.reply_keys.clear()
        if record.wants_pin:
            self._pin_inspected(record)
        return record

    def on_loaded(self, event: AdapterLoaded, record: Adapter, waited: Iterable[Request]) -> None:
        """Record the end of a load, after the cache did."""
        now = self._clock()
        self.service.on_loaded(event, record, waited)
        if event.error:
            if record.is_pinned:
                logger.warning("adapter %r is pinned no longer: %s", record.name, event.error)
            self.pins.unpin(record, now)
            self.registry.fail(record, event.error)
        else:
            self._memory.adapters.set_in_host(event.content_hash, True)
            self.pins.keep(now)
        self._release_unwanted(event.content_hash)

    def on_evicted(self, content_hash: str) -> None:
        """The host store has it no more."""
        self._memory.adapters.set_in_host(content_hash, False)

    def pin(self, name: str, reply_key: Hashable) -> None:
        """Pin what the name means; answered by an update, once its files are inspected."""
        record = self.registry.resolve(name)
        if record.state is AdapterState.READY:
            self._reply(reply_key, record, self.pins.pin(record))
            return
        record.wants_pin = True
        record.pin_keys.append(reply_key)
        self.registry.inspect_once(record)

    def unpin(self, name: str) -> Adapter:
        record = self.registry.find(name)
        self.pins.unpin(record, self._clock())
        self._answer_pins(record, f"adapter {name!r} was unpinned while it was being read")
        return record

    def take_updates(self) -> list[AdapterUpdate]:
        updates, self._updates = self._updates, []
        return updates

    def _reply(self, reply_key: Hashable, record: Adapter, refusal: str) -> None:
        code, adapter = ("adapter", {}) if refusal else ("", self.describe(record, {}))
        self._updates.append(AdapterUpdate(reply_key, record.name, refusal, code, adapter))

    def _pin_inspected(self, record: Adapter) -> None:
        failed = record.state is AdapterState.FAILED
        refusal = failure(record) if failed else self.pins.pin(record)
        if refusal and not record.pin_keys:
            logger.warning("%s; its name was pinned, and is no longer", refusal)
        self._answer_pins(record, refusal)

    def _answer_pins(self, record: Adapter, refusal: str) -> None:
        record.wants_pin = False
        for reply_key in record.pin_keys:
            self._reply(reply_key, record, refusal)
        record.pin_keys.clear()

    def _on_retired(self, record: Adapter, successor: Adapter | None) -> None:
        """A pin is the name's: the next version takes it over, if it fits the share."""
        was_pinned = record.is_pinned or record.wants_pin
        self.pins.unpin(record, self._clock())
        if successor is None:
            self._answer_pins(record, f"adapter {record.name!r} was unloaded")
        elif was_pinned:
            successor.wants_pin = True
            successor.pin_keys += record.pin_keys
            record.wants_pin = False
            record.pin_keys.clear()
            if successor.state is AdapterState.READY:
                self._pin_inspected(successor)
            elif successor.state is AdapterState.REGISTERED:
                self.registry.inspect_once(successor)

    def _release_unwanted(self, content_hash: str) -> None:
        """Free a content that no name and no request refers to; one that still loads is asked
        about again when it is loaded."""
        if self.registry.with_hash(content_hash):
            return
        adapter = self._memory.adapters.get(content_hash)
        if adapter is not None:
            if not adapter.is_idle:
                return
            self._memory.evict_adapter(content_hash)
        self._memory.adapters.set_in_host(content_hash, False)
        self._send(DropAdapter(content_hash))

    def describe_all(self, name: str, running: Iterable[Request]) -> list[dict[str, Any]]:
        """The adapter of this name, or all for an empty one, as plain values."""
        num_running = Counter(request.record for request in running)
        records = [self.registry.find(name)] if name else self.registry
        return [self.describe(record, num_running) for record in records]

    def describe(
        self, record: Adapter, num_running: Mapping[Adapter | None, int]
    ) -> dict[str, Any]:
        """One named adapter as plain values; `num_running` counts running requests by record."""
        adapter = self._memory.adapters.get(record.content_hash) if record.content_hash else None
        is_resident = adapter is not None and adapter.residency is Residency.RESIDENT
        in_host = self._memory.adapters.is_in_host(record.content_hash)
        last_use = self._clock() if record.num_requests else record.last_use
        return {
            "name": record.name,
            "path": record.path,
            "state": record.state.value,
            "error": record.error,
            "content_hash": record.content_hash,
            "num_pages": record.num_pages,
            "num_bytes": record.num_bytes,
            "max_rank": record.max_rank,
            "modules": list(record.modules),
            "tier": "pages" if is_resident else "host" if in_host else "disk",
            "residency": adapter.residency.value if adapter else "none",
            "pinned": record.is_pinned or record.wants_pin,
            "num_requests": record.num_requests,
            "num_running": num_running.get(record, 0),
            "num_users": self._num_users(adapter) if adapter else 0,
            "num_waiting": record.num_requests - num_running.get(record, 0),
            "seconds_since_use": self._clock() - last_use if last_use >= 0 else None,
            "service": record.service.snapshot() if record.service else {},
        }

    def describe_resident(self) -> list[dict[str, Any]]:
        """Every content in pages as plain values."""
        return [
            {
                "content_hash": adapter.content_hash,
                "names": [record.name for record in self.registry.with_hash(adapter.content_hash)],
                "num_pages": len(adapter.page_ids),
                "residency": adapter.residency.value,
                "pinned": self.pins.is_held(adapter.content_hash),
                "adapter_slot": adapter.slot,
                "num_users": self._num_users(adapter),
                "seconds_since_use": self._idle_seconds(adapter),
            }
            for adapter in self._memory.adapters
        ]

    def stats(self) -> dict[str, Any]:
        """Counts over all adapters, and the base model's."""
        return {
            "registered_adapters": len(self.registry),
            "resident_adapters": self.describe_resident(),
            "host_adapters": self._memory.adapters.num_in_host,
            "pinned_adapters": len(self.pins),
            "pages_pinned": self.pins.num_pages,
            "adapter_service": self.service.adapters.snapshot(),
            "base_service": self.service.base.snapshot(),
        }

    def _num_users(self, adapter: CachedAdapter) -> int:
        return adapter.num_pins - self.pins.is_held(adapter.content_hash)

    def _idle_seconds(self, adapter: CachedAdapter) -> float:
        return 0.0 if self._num_users(adapter) else self._clock() - adapter.last_use
