"""The logical half of the page pool: one block manager, its two tenants, and their eviction."""

from collections.abc import Callable, Iterator

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.block_manager import BlockManager, OutOfPagesError, Owner
from loraplex.memory.eviction import choose_victims
from loraplex.memory.kv_cache import KVCache


class LogicalMemory:
    """Pages shared by KV cache and adapters; `unload` is told the slot of each adapter evicted."""

    def __init__(
        self,
        *,
        num_pages: int,
        block_tokens: int,
        max_adapter_slots: int,
        enable_prefix_caching: bool,
        unload: Callable[[int], None],
    ) -> None:
        self.blocks = BlockManager(num_pages)
        self.kv = KVCache(self.blocks, block_tokens, enable_prefix_caching=enable_prefix_caching)
        self.adapters = AdapterCache(self.blocks, max_adapter_slots)
        self._unload = unload

    @property
    def num_available(self) -> int:
        """Pages that are free or would be after evicting everything idle."""
        return self.blocks.num_free + self.kv.num_idle + self.adapters.num_idle_pages

    @property
    def has_adapter_slot(self) -> bool:
        """Whether a slot is free or would be after evicting an idle adapter."""
        return bool(self.adapters.num_free_slots or self.adapters.num_idle)

    def make_room(self, num_pages: int) -> None:
        """Evict idle tenants until `num_pages` are free.

        Raises:
            OutOfPagesError: fewer are available; nothing is evicted.
        """
        num_missing = num_pages - self.blocks.num_free
        if num_missing <= 0:
            return
        if num_pages > self.num_available:
            raise OutOfPagesError(f"{num_pages} pages asked for, {self.num_available} available")
        for victim in choose_victims(
            num_missing, self.adapters.idle_adapters(), self.kv.idle_blocks()
        ):
            if isinstance(victim.key, str):
                self.evict_adapter(victim.key)
            else:
                self.kv.evict(victim.key)

    def make_adapter_slot(self) -> None:
        """Free an adapter slot by evicting the least recently used idle adapter, if none is."""
        if not self.adapters.num_free_slots:
            self.evict_adapter(str(next(self.adapters.idle_adapters()).key))

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

    def _claims(self) -> Iterator[tuple[int, Owner, int]]:
        yield from self.kv.claims()
        yield from self.adapters.claims()
