"""The logical half of the page pool: one block manager, its two tenants, and their eviction."""

from collections.abc import Callable, Iterator

from loraplex.memory.accounting.adapter_cache import AdapterCache
from loraplex.memory.accounting.block_manager import (
    BlockManager,
    IntegrityError,
    OutOfPagesError,
    Owner,
)
from loraplex.memory.accounting.eviction import EvictionClock, Priority
from loraplex.memory.accounting.kv_cache import KVCache


class PageManager:
    """Pages shared by KV cache and adapters; `unload` is told the slot of each adapter evicted.

    With `fixed_slot_pages` the pool is not unified, for comparison: each adapter slot has that
    many pages of its own, whatever its adapter needs of them, and KV never gets them. An adapter
    then costs a slot and nothing of the rest.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        block_tokens: int,
        max_adapter_slots: int,
        enable_prefix_caching: bool,
        unload: Callable[[int], None],
        eviction_policy: str = "cost",
        fixed_slot_pages: int = 0,
    ) -> None:
        """Raises ValueError: the fixed slots leave no page for KV."""
        self.fixed_slot_pages = fixed_slot_pages
        self._num_reserved = max_adapter_slots * fixed_slot_pages
        if self._num_reserved >= num_pages - 1:
            raise ValueError(
                f"{max_adapter_slots} fixed adapter slots of {fixed_slot_pages} pages leave no "
                f"page for KV: the pool has {num_pages - 1}; lower fixed_adapter_slots or "
                "max_lora_rank, or enlarge the pool"
            )
        self.clock = EvictionClock(eviction_policy)
        self.blocks = BlockManager(num_pages)
        self.kv = KVCache(
            self.blocks, self.clock, block_tokens, enable_prefix_caching=enable_prefix_caching
        )
        self.adapters = AdapterCache(self.blocks, self.clock, max_adapter_slots)
        self._unload = unload

    @property
    def is_unified(self) -> bool:
        """Whether a page that an adapter gives up can become KV."""
        return not self.fixed_slot_pages

    @property
    def num_usable(self) -> int:
        """Pages that KV can have when nothing else is there."""
        return self.blocks.num_usable - self._num_reserved

    @property
    def num_free(self) -> int:
        """Free pages that KV may take."""
        if self.fixed_slot_pages:
            in_slots = self.blocks.num_owned(Owner.ADAPTER)
            return self.blocks.num_free - self._num_reserved + in_slots
        return self.blocks.num_free

    @property
    def num_available(self) -> int:
        """Pages that are free for KV or would be after evicting everything idle."""
        if self.fixed_slot_pages:
            return self.num_free + self.kv.num_idle
        return self.blocks.num_free + self.kv.num_idle + self.adapters.num_idle_pages

    @property
    def has_adapter_slot(self) -> bool:
        """Whether a slot is free or would be after evicting an idle adapter."""
        return bool(self.adapters.num_free_slots or self.adapters.num_idle)

    def charge(self, num_pages: int) -> int:
        """Of `num_available`, what an adapter of `num_pages` takes."""
        return 0 if self.fixed_slot_pages else num_pages

    def make_room(self, num_pages: int, *, below: Priority | None = None) -> bool:
        """Evict idle tenants, lowest priority first, until `num_pages` are free for KV.

        With `below`, nothing of that priority or above is evicted; False if that is too little.

        Raises:
            OutOfPagesError: fewer are available, and `below` is not given; nothing is evicted.
        """
        if num_pages <= self.num_free:
            return True
        if num_pages > self.num_available:
            if below is not None:
                return False
            raise OutOfPagesError(f"{num_pages} pages asked for, {self.num_available} available")
        while num_pages > self.num_free:
            block = self.kv.first_idle()
            adapter = self.adapters.first_idle() if self.is_unified else None
            if block is not None and (adapter is None or block[0] < adapter[0]):
                if below is not None and block[0] >= below:
                    return False
                self.clock.advance(block[0])
                self.kv.evict(block[1])
            elif not self._evict_adapter_below(below):
                return False
        return True

    def make_adapter_slot(self, *, below: Priority | None = None) -> bool:
        """Free an adapter slot, if none is, by evicting the idle adapter of lowest priority.

        With `below`, only one of a lower priority is; False if there is none.
        """
        return bool(self.adapters.num_free_slots) or self._evict_adapter_below(below)

    def _evict_adapter_below(self, below: Priority | None) -> bool:
        first = self.adapters.first_idle()
        if first is None or (below is not None and first[0] >= below):
            return False
        self.clock.advance(first[0])
        self.evict_adapter(first[1])
        return True

    def evict_adapter(self, content_hash: str) -> None:
        """Free the slot and pages of an idle adapter."""
        self._unload(self.adapters.release(content_hash))

    def num_owned(self) -> dict[str, int]:
        """Pages by use."""
        return {owner.name.lower(): self.blocks.num_owned(owner) for owner in Owner}

    def check_integrity(self) -> None:
        """Prove that no page is lost, shared by mistake or leaked; raises IntegrityError."""
        self.kv.check_integrity()
        self.adapters.check_integrity()
        self.blocks.check_integrity(self._claims())
        if self.num_free < 0:
            raise IntegrityError(f"KV has {-self.num_free} pages of the adapter slots")
        for adapter in self.adapters:
            if self.fixed_slot_pages and len(adapter.page_ids) > self.fixed_slot_pages:
                raise IntegrityError(f"adapter {adapter.content_hash} is larger than its slot")

    def _claims(self) -> Iterator[tuple[int, Owner, int]]:
        yield from self.kv.claims()
        yield from self.adapters.claims()
