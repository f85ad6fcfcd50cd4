"""The accounting of adapters in pages: which are resident or loading, and how many users they have.

An adapter is known by the hash of its content, so equal adapters under several names share one set
of pages. Its adapter slot is its row in the workers' table of resident adapters.
"""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from loraplex.memory.accounting.block_manager import BlockManager, IntegrityError, Owner
from loraplex.memory.accounting.eviction import EvictionClock, EvictionQueue, Priority, load_cost_ns


@dataclass(slots=True, eq=False)
class CachedAdapter:
    """One adapter in pages.

    Attributes:
        is_loading: a load owns the pages until it is answered. They are not read or evicted.
        num_reservations: users that keep it in its pages.
        num_planned: steps planned when its last user ended. Before its first use: when the last
            user ended of whatever its slot and pages held before.
    """

    content_hash: str
    slot: int
    page_ids: list[int] = field(repr=False)
    num_bytes: int = 0
    is_loading: bool = True
    num_reservations: int = 0
    num_planned: int = 0
    last_use: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it may be evicted."""
        return not self.num_reservations and not self.is_loading


class AdapterCache:
    """Content hash -> pages and adapter slot. Idle adapters stay until they are evicted.

    Invariant: a loading adapter keeps its slot and pages until `finish_load` or `fail_load`.
    """

    def __init__(self, blocks: BlockManager, clock: EvictionClock, max_slots: int) -> None:
        self._blocks = blocks
        self._clock = clock
        self._max_slots = max_slots
        self._free_slots = deque(range(max_slots))  # the slot freed first is handed out first
        self._num_planned_at_release = [0] * max_slots
        self._adapters: dict[str, CachedAdapter] = {}
        # Pages that an adapter had before keep its slot.
        self._slot_of_page = array("i", bytes(4 * blocks.num_pages))
        self._idle = EvictionQueue()
        self._num_idle_pages = 0
        self._on_host: set[str] = set()

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
    def num_on_host(self) -> int:
        return len(self._on_host)

    @property
    def max_slots(self) -> int:
        return self._max_slots

    def get(self, content_hash: str) -> CachedAdapter | None:
        return self._adapters.get(content_hash)

    def slot_of(self, content_hash: str) -> int:
        """Return the slot of an adapter that is in pages."""
        return self._adapters[content_hash].slot

    def slots_of_every(self, step: int) -> "array[int]":
        """Return the adapter slots of the pages 1, 1 + step, 1 + 2 * step and so on.

        Only entries of pages that belong to adapters mean something.
        """
        return self._slot_of_page[1::step]

    def is_on_host(self, content_hash: str) -> bool:
        """Whether the workers' host store has the adapter, be it in pages or not."""
        return content_hash in self._on_host

    def on_host(self, limit: int) -> list[str]:
        """Return content hashes that the host store has, at most `limit`, in no order."""
        return list(islice(self._on_host, limit))

    def set_on_host(self, content_hash: str, on_host: bool) -> None:
        """Record whether the host store has the adapter; this changes its cost of eviction."""
        if on_host == self.is_on_host(content_hash):
            return
        self._on_host ^= {content_hash}
        adapter = self._adapters.get(content_hash)
        if adapter is not None and adapter.is_idle:
            priority = self._clock.adjust(
                self._idle.remove(content_hash),
                len(adapter.page_ids),
                old_cost_ns=load_cost_ns(adapter.num_bytes, on_host=not on_host),
                cost_ns=load_cost_ns(adapter.num_bytes, on_host=on_host),
            )
            self._idle.add(content_hash, priority)

    def load_cost_ns(self, content_hash: str, num_bytes: int) -> int:
        """Estimate the time to bring the adapter into pages from where it is."""
        return load_cost_ns(num_bytes, on_host=self.is_on_host(content_hash))

    def allocate(
        self, content_hash: str, num_pages: int, now: float, *, num_bytes: int = 0
    ) -> CachedAdapter:
        """Take a slot and pages for a load of `num_bytes`.

        Raises:
            IntegrityError: the adapter has pages already, or no slot is free.
            OutOfPagesError: fewer pages are free.
        """
        if content_hash in self._adapters:
            raise IntegrityError(f"adapter {content_hash} already has pages")
        if not self._free_slots:
            raise IntegrityError("no adapter slot is free")
        page_ids = self._blocks.allocate(Owner.ADAPTER, num_pages)
        slot = self._free_slots.popleft()
        for page_id in page_ids:
            self._slot_of_page[page_id] = slot
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
        """Let users run: the pages hold the weights. Without reservations the adapter is idle."""
        adapter = self._loading(content_hash)
        adapter.is_loading = False
        adapter.last_use = now
        if adapter.is_idle:
            self._make_idle(adapter)

    def fail_load(self, content_hash: str) -> None:
        """Free the slot and pages of a load that failed; it must have no reservations."""
        self._loading(content_hash).is_loading = False
        self._free(content_hash)

    def _loading(self, content_hash: str) -> CachedAdapter:
        adapter = self._adapters[content_hash]
        if not adapter.is_loading:
            raise IntegrityError(f"adapter {content_hash} is not loading")
        return adapter

    def reserve(self, content_hash: str) -> None:
        """Keep the adapter in its pages until the matching unreserve()."""
        adapter = self._adapters[content_hash]
        if adapter.is_idle:
            self._end_idle(adapter)
        adapter.num_reservations += 1

    def unreserve(self, content_hash: str, now: float) -> None:
        """End one reservation; raises IntegrityError if there is none."""
        adapter = self._adapters[content_hash]
        if not adapter.num_reservations:
            raise IntegrityError(f"adapter {content_hash} has no reservation to end")
        adapter.num_reservations -= 1
        adapter.num_planned = self._blocks.num_planned
        adapter.last_use = now
        if adapter.is_idle:
            self._make_idle(adapter)

    def evict(self, content_hash: str) -> int:
        """Free the slot and pages of an idle adapter; returns the slot.

        Raises:
            IntegrityError: it is loading or reserved.
        """
        adapter = self._adapters[content_hash]
        if not adapter.is_idle:
            raise IntegrityError(f"adapter {content_hash} is loading or reserved")
        self._end_idle(adapter)
        return self._free(content_hash)

    def _free(self, content_hash: str) -> int:
        adapter = self._adapters[content_hash]
        if adapter.num_reservations:
            raise IntegrityError(f"adapter {content_hash} is reserved")
        del self._adapters[content_hash]
        for page_id in reversed(adapter.page_ids):
            self._blocks.release(page_id, num_planned=adapter.num_planned)
        self._free_slots.append(adapter.slot)
        self._num_planned_at_release[adapter.slot] = adapter.num_planned
        return adapter.slot

    def first_idle(self) -> tuple[Priority, str] | None:
        """Return priority and content hash of the idle adapter to evict first."""
        return self._idle.first()

    def _make_idle(self, adapter: CachedAdapter) -> None:
        num_pages = len(adapter.page_ids)
        cost_ns = self.load_cost_ns(adapter.content_hash, adapter.num_bytes)
        self._idle.add(adapter.content_hash, self._clock.stamp(cost_ns, num_pages))
        self._num_idle_pages += num_pages

    def _end_idle(self, adapter: CachedAdapter) -> None:
        self._idle.remove(adapter.content_hash)
        self._num_idle_pages -= len(adapter.page_ids)

    def claims(self) -> Iterator[tuple[int, Owner, int]]:
        """Yield what the block manager must know: (page id, owner, references)."""
        for adapter in self._adapters.values():
            for page_id in adapter.page_ids:
                yield page_id, Owner.ADAPTER, 1

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each slot is free or used once and all counts are exact."""
        slots = [*self._free_slots, *(adapter.slot for adapter in self._adapters.values())]
        if sorted(slots) != list(range(self._max_slots)):
            raise IntegrityError("an adapter slot is lost or used twice")
        idle = {key for key, adapter in self._adapters.items() if adapter.is_idle}
        if idle != set(self._idle):
            raise IntegrityError("the eviction queue does not hold exactly the idle adapters")
        for adapter in self._adapters.values():
            if any(self._slot_of_page[page_id] != adapter.slot for page_id in adapter.page_ids):
                raise IntegrityError(f"a page of adapter {adapter.content_hash} has another slot")
        num_idle_pages = sum(len(self._adapters[key].page_ids) for key in idle)
        if num_idle_pages != self._num_idle_pages:
            raise IntegrityError(
                f"idle adapters hold {num_idle_pages} pages, counted as {self._num_idle_pages}"
            )
