"""Adapters in pages, logically: which content is resident where, and who uses it.

An adapter is known by the hash of its content, so equal adapters under several names share one
set of pages. Its adapter slot is its row in the workers' table of resident adapters.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from loraplex.memory.accounting.block_manager import BlockManager, IntegrityError, Owner
from loraplex.memory.accounting.eviction import EvictionClock, EvictionQueue, Priority, load_cost_ns


class Residency(Enum):
    LOADING = "loading"  # pages are reserved and being written; nobody may read or evict them
    RESIDENT = "resident"


@dataclass(slots=True, eq=False)
class CachedAdapter:
    """One content in pages."""

    content_hash: str
    slot: int
    page_ids: list[int] = field(repr=False)
    num_bytes: int = 0
    residency: Residency = Residency.LOADING
    num_pins: int = 0
    num_planned: int = 0
    """Steps planned when the last user of it ended or, until it has one, the last user of what was
    in its slot and pages before."""
    last_use: float = 0.0

    @property
    def is_idle(self) -> bool:
        return self.num_pins == 0 and self.residency is Residency.RESIDENT


class AdapterCache:
    """Content hash -> pages and adapter slot. Idle adapters stay until they are evicted."""

    def __init__(self, blocks: BlockManager, clock: EvictionClock, max_slots: int) -> None:
        self._blocks = blocks
        self._clock = clock
        self._max_slots = max_slots
        self._free_slots = deque(range(max_slots))  # handed out first: what was freed first
        self._num_planned_at_release = [0] * max_slots
        self._adapters: dict[str, CachedAdapter] = {}
        self._idle = EvictionQueue()
        self._num_idle_pages = 0
        self._in_host: set[str] = set()

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[CachedAdapter]:
        return iter(self._adapters.values())

    @property
    def num_idle_pages(self) -> int:
        """Pages that eviction could free."""
        return self._num_idle_pages

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_in_host(self) -> int:
        return len(self._in_host)

    def get(self, content_hash: str) -> CachedAdapter | None:
        return self._adapters.get(content_hash)

    def is_in_host(self, content_hash: str) -> bool:
        """Whether the workers' host store has the content, resident or not."""
        return content_hash in self._in_host

    def set_in_host(self, content_hash: str, in_host: bool) -> None:
        """An idle adapter is as dear as its tier below: from disk it costs several times more."""
        if in_host == self.is_in_host(content_hash):
            return
        self._in_host ^= {content_hash}
        adapter = self._adapters.get(content_hash)
        if adapter is not None and adapter.is_idle:
            priority = self._clock.adjust(
                self._idle.remove(content_hash),
                len(adapter.page_ids),
                old_cost_ns=load_cost_ns(adapter.num_bytes, on_host=not in_host),
                cost_ns=load_cost_ns(adapter.num_bytes, on_host=in_host),
            )
            self._idle.add(content_hash, priority)

    def load_cost_ns(self, content_hash: str, num_bytes: int) -> int:
        """Time to bring the content into pages from where it is."""
        return load_cost_ns(num_bytes, on_host=self.is_in_host(content_hash))

    def allocate(
        self, content_hash: str, num_pages: int, now: float, *, num_bytes: int = 0
    ) -> CachedAdapter:
        """Reserve a slot and pages for a load of `num_bytes`; there must be room for both."""
        if content_hash in self._adapters:
            raise IntegrityError(f"adapter {content_hash} already has pages")
        if not self._free_slots:
            raise IntegrityError("no adapter slot is free")
        page_ids = self._blocks.allocate(Owner.ADAPTER, num_pages)
        slot = self._free_slots.popleft()
        adapter = CachedAdapter(
            content_hash,
            slot,
            page_ids,
            num_bytes=num_bytes,
            last_use=now,
            num_planned=max(
                self._blocks.num_planned_at_release(page_ids), self._num_planned_at_release[slot]
            ),
        )
        self._adapters[content_hash] = adapter
        return adapter

    def finish_load(self, content_hash: str, now: float) -> None:
        """The pages hold the weights: users may run, and an adapter without pins is idle."""
        adapter = self._adapters[content_hash]
        if adapter.residency is not Residency.LOADING:
            raise IntegrityError(f"adapter {content_hash} is not loading")
        adapter.residency = Residency.RESIDENT
        adapter.last_use = now
        if not adapter.num_pins:
            self._make_idle(adapter)

    def pin(self, content_hash: str) -> None:
        """Keep the adapter in its pages until the matching unpin()."""
        adapter = self._adapters[content_hash]
        if adapter.is_idle:
            self._unmake_idle(adapter)
        adapter.num_pins += 1

    def unpin(self, content_hash: str, now: float) -> None:
        adapter = self._adapters[content_hash]
        if not adapter.num_pins:
            raise IntegrityError(f"adapter {content_hash} unpinned without a pin")
        adapter.num_pins -= 1
        adapter.num_planned = self._blocks.num_planned
        adapter.last_use = now
        if adapter.is_idle:
            self._make_idle(adapter)

    def release(self, content_hash: str) -> int:
        """Free the slot and the pages of an adapter without pins; returns the slot."""
        adapter = self._adapters[content_hash]
        if adapter.num_pins:
            raise IntegrityError(f"adapter {content_hash} is pinned")
        if adapter.is_idle:
            self._unmake_idle(adapter)
        del self._adapters[content_hash]
        for page_id in reversed(adapter.page_ids):
            self._blocks.release(page_id, num_planned=adapter.num_planned)
        self._free_slots.append(adapter.slot)
        self._num_planned_at_release[adapter.slot] = adapter.num_planned
        return adapter.slot

    def first_idle(self) -> tuple[Priority, str] | None:
        """Priority and content hash of the idle adapter to evict first."""
        return self._idle.first()

    def _make_idle(self, adapter: CachedAdapter) -> None:
        num_pages = len(adapter.page_ids)
        cost_ns = self.load_cost_ns(adapter.content_hash, adapter.num_bytes)
        self._idle.add(adapter.content_hash, self._clock.stamp(cost_ns, num_pages))
        self._num_idle_pages += num_pages

    def _unmake_idle(self, adapter: CachedAdapter) -> None:
        self._idle.remove(adapter.content_hash)
        self._num_idle_pages -= len(adapter.page_ids)

    def claims(self) -> Iterator[tuple[int, Owner, int]]:
        """What the block manager's books must say: (page id, owner, references)."""
        for adapter in self._adapters.values():
            for page_id in adapter.page_ids:
                yield page_id, Owner.ADAPTER, 1

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every slot is free or used once and idleness is exact."""
        slots = [*self._free_slots, *(adapter.slot for adapter in self._adapters.values())]
        if sorted(slots) != list(range(self._max_slots)):
            raise IntegrityError("an adapter slot is lost or used twice")
        idle = {key for key, adapter in self._adapters.items() if adapter.is_idle}
        if idle != set(self._idle):
            raise IntegrityError("an adapter is idle in one book and not in the other")
        num_idle_pages = sum(len(self._adapters[key].page_ids) for key in idle)
        if num_idle_pages != self._num_idle_pages:
            raise IntegrityError(
                f"idle adapters hold {num_idle_pages} pages, counted as {self._num_idle_pages}"
            )
