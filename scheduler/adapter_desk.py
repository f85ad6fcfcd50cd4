"""Adapters as the user sees them: names, outcomes of loads, and what is resident."""

from collections.abc import Callable
from typing import Any

from loraplex.memory.adapter_cache import CachedAdapter
from loraplex.memory.logical import LogicalMemory
from loraplex.scheduler.adapters import Adapter, AdapterRegistry, AdapterUpdate
from loraplex.scheduler.plan import AdapterInspected, InspectAdapter


class AdapterDesk:
    """Joins the registry of names with the cache of contents."""

    def __init__(
        self,
        *,
        memory: LogicalMemory,
        send: Callable[[InspectAdapter], None],
        clock: Callable[[], float],
    ) -> None:
        self._memory = memory
        self._clock = clock
        self._updates: list[AdapterUpdate] = []
        self.registry = AdapterRegistry(
            max_pages=memory.blocks.num_usable, send=send, orphan=self.release_unwanted
        )

    def on_inspected(self, event: AdapterInspected) -> Adapter:
        """Record an inspection and answer whoever asked for it."""
        record, refusal = self.registry.on_inspected(event)
        for reply_key in record.reply_keys:
            self._updates.append(
                AdapterUpdate(
                    reply_key=reply_key,
                    name=record.name,
                    error=refusal,
                    error_code="adapter" if refusal else "",
                    adapter=self.describe(record),
                )
            )
        record.reply_keys.clear()
        return record

    def take_updates(self) -> list[AdapterUpdate]:
        updates, self._updates = self._updates, []
        return updates

    def release_unwanted(self, content_hash: str) -> None:
        """Free a content that no name and no request refers to; one that still loads is asked
        about again when it is loaded."""
        adapter = self._memory.adapters.get(content_hash)
        if adapter and adapter.is_idle and not self.registry.with_hash(content_hash):
            self._memory.evict_adapter(content_hash)

    def describe(self, record: Adapter) -> dict[str, Any]:
        """One named adapter as plain values."""
        adapter = self._memory.adapters.get(record.content_hash) if record.content_hash else None
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
            "num_requests": record.num_requests,
            "residency": adapter.residency.value if adapter else "none",
        } | (self._usage(adapter) if adapter else {})

    def describe_resident(self) -> list[dict[str, Any]]:
        """Every content in pages as plain values."""
        return [
            {
                "content_hash": adapter.content_hash,
                "names": [record.name for record in self.registry.with_hash(adapter.content_hash)],
                "num_pages": len(adapter.page_ids),
                "residency": adapter.residency.value,
            }
            | self._usage(adapter)
            for adapter in self._memory.adapters
        ]

    def _usage(self, adapter: CachedAdapter) -> dict[str, Any]:
        return {
            "adapter_slot": adapter.slot,
            "num_users": adapter.num_pins,
            "seconds_since_use": 0.0 if adapter.num_pins else self._clock() - adapter.last_use,
        }
