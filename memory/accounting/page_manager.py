"""The accounting of the page pool: one block manager, its two tenants, and their eviction."""

from collections.abc import Callable, Iterator

from loraplex.memory.accounting.adapter_cache import AdapterCache
from loraplex.memory.accounting.block_manager import BlockManager, OutOfPagesError, Owner
from loraplex.memory.accounting.eviction import EvictionClock, Priority
from loraplex.memory.accounting.kv_cache import KVCache


class PageManager:
    """Pages shared by the KV cache and the adapters.

    Attributes:
        num_adapter_evictions, num_prefix_evictions: adapters and prefix blocks evicted to make
            room.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        block_tokens: int,
        max_adapter_slots: int,
        enable_prefix_caching: bool,
        unload: Callable[[int], None],
        clock: EvictionClock | None = None,
    ) -> None:
        """Make the accounts of an empty pool.

        Args:
            num_pages: pages of the pool, the null page included.
            unload: called with the adapter slot of each adapter that is evicted.
            clock: orders evictions; default: by cost.
        """
        self.clock = clock or EvictionClock()
        self.blocks = BlockManager(num_pages)
        self.kv = KVCache(
            self.blocks, self.clock, block_tokens, enable_prefix_caching=enable_prefix_caching
        )
        self.adapters = AdapterCache(self.blocks, self.clock, max_adapter_slots)
        self._unload = unload
        self.num_adapter_evictions = self.num_prefix_evictions = 0

    @property
    def num_free(self) -> int:
        return self.blocks.num_free

    @property
    def num_available(self) -> int:
        """Pages that are free, or would be after evicting everything idle."""
        return self.blocks.num_free + self.kv.num_idle + self.adapters.num_idle_pages

    @property
    def has_adapter_slot(self) -> bool:
        """Whether an adapter slot is free, or would be after evicting an idle adapter."""
        return bool(self.adapters.num_free_slots or self.adapters.num_idle)

    def make_room(self, num_pages: int, *, below: Priority | None = None) -> bool:
        """Evict idle tenants, lowest priority first, until `num_pages` are free.

        Args:
            below: evict only what has a lower priority than this.

        Returns:
            Whether the pages are free. Always true without `below`.

        Raises:
            OutOfPagesError: fewer are available, and `below` is not given; nothing is evicted.
        """
        if num_pages > self.num_available:
            if below is not None:
                return False
            raise OutOfPagesError(f"{num_pages} pages asked for, {self.num_available} available")
        while self.num_free < num_pages:
            if not self.evict_pages(below):
                return False
        return True

    def evict_pages(self, below: Priority | None = None) -> bool:
        """Evict the idle tenant of the lowest priority; false if none is below `below`."""
        block, adapter = self.kv.first_idle(), self.adapters.first_idle()
        if block is None or (adapter is not None and adapter[0] < block[0]):
            return self._evict_adapter(below)
        if below is not None and block[0] >= below:
            return False
        self.clock.advance(block[0])
        self.kv.evict(block[1])
        self.num_prefix_evictions += 1
        return True

    def make_adapter_slot(self, *, below: Priority | None = None) -> bool:
        """Free an adapter slot by evicting the idle adapter of the lowest priority, if none is
        free.

        Args:
            below: evict only an adapter of a lower priority than this.

        Returns:
            Whether a slot is free.
        """
        return bool(self.adapters.num_free_slots) or self._evict_adapter(below)

    def _evict_adapter(self, below: Priority | None) -> bool:
        first = self.adapters.first_idle()
        if first is None or (below is not None and first[0] >= below):
            return False
        self.clock.advance(first[0])
        self.evict_adapter(first[1])
        self.num_adapter_evictions += 1
        return True

    def evict_adapter(self, content_hash: str) -> None:
        """Free the slot and pages of an idle adapter."""
        self._unload(self.adapters.evict(content_hash))

    def num_owned(self) -> dict[str, int]:
        """Return the number of pages of each owner, by its name in lower case."""
        return {owner.name.lower(): self.blocks.num_owned(owner) for owner in Owner}

    def check_integrity(self) -> None:
        """Prove that no page is lost, shared by mistake or leaked; raises IntegrityError."""
        self.kv.check_integrity()
        self.adapters.check_integrity()
        self.blocks.check_integrity(self._claims())

    def _claims(self) -> Iterator[tuple[int, Owner, int]]:
        yield from self.kv.claims()
        yield from self.adapters.claims()
