"""Ways of managing memory that the product does not have, to compare with the one it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loraplex.memory.accounting.eviction import EvictionClock, Priority
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters import prefetch


class LRUClock(EvictionClock):
    """Orders evictions by the time since the last use alone."""

    def stamp(self, cost_ns: int, num_pages: int) -> Priority:
        return super().stamp(0, 1)

    def adjust(
        self, priority: Priority, num_pages: int, *, old_cost_ns: int, cost_ns: int
    ) -> Priority:
        return priority


class FixedSlotsPageManager(PageManager):
    """A pool for KV alone, beside adapter slots with memory of their own.

    Adapters need no pages of this pool: the workers report them with 0 pages, and the pool is
    smaller by the memory of the slots. So an idle adapter is evicted for its slot alone, by the
    time since its last use.
    """

    def __init__(self, *, unload: Callable[[int], None], **options: Any) -> None:
        super().__init__(unload=unload, clock=LRUClock(), **options)

    def evict_pages(self, below: Priority | None = None) -> bool:
        """Evict the idle prefix block of the lowest priority."""
        block = self.kv.first_idle()
        if block is None or (below is not None and block[0] >= below):
            return False
        self.clock.advance(block[0])
        self.kv.evict(block[1])
        return True


def lru_page_manager(**options: Any) -> PageManager:
    """Make one pool for KV and adapters with eviction by last use."""
    return PageManager(**options, clock=LRUClock())


@contextmanager
def no_prefetch() -> Iterator[None]:
    """Load no adapter before a request can start, in this process."""
    max_loads, prefetch.MAX_LOADS = prefetch.MAX_LOADS, 0
    try:
        yield
    finally:
        prefetch.MAX_LOADS = max_loads
