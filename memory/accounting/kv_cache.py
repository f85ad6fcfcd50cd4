"""Page tables of the running requests, and the cache of prefix blocks that requests share.

A block is one page of `block_tokens` tokens. A full block is known by a chained hash of everything
its KV depends on: base model, all tokens up to its end, and the adapters that have begun to apply
by its end, with their weights and first positions; and of tenant and salt. Equal hashes mean equal
KV, so requests may share the page. Different tenants, salts or bases share nothing. Requests with
different adapters share the blocks before the first position of either.

Invariant: a block is in the cache as soon as the step that writes it is planned. Workers run steps
in order, so every later step may read it. The rows of one step run in no order, so no row may read
what another row of its own step writes; find_prefix() stops before such a block.
"""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from loraplex.memory.accounting.block_chain import BlockChain, BlockObserver
from loraplex.memory.accounting.block_manager import BlockManager, IntegrityError, Owner
from loraplex.memory.accounting.eviction import EvictionClock, Priority, recompute_cost_ns


class Prefix(NamedTuple):
    """The cached prefix of a request."""

    page_ids: list[int]
    is_growing: bool
    """The step that is being planned writes the next block; the step after it can share that."""


NO_PREFIX = Prefix([], False)


class _Table:
    """The pages of one running request, in order of position."""

    __slots__ = ("chain", "num_registered", "page_ids")

    def __init__(self, chain: BlockChain, page_ids: list[int]) -> None:
        self.chain = chain
        self.page_ids = page_ids
        self.num_registered = len(page_ids)  # leading blocks that were registered


class KVCache:
    """Page tables of running requests, and prefix blocks that outlive them.

    A prefix block in use has a reference for each user. An idle one stays cached until it is
    evicted, and a hit makes it a block in use again. If two requests compute equal blocks, only the
    first one is cached.

    Every block costs the same to compute again, so a later stamp is never lower, and idle blocks
    are evicted in the order in which they became idle. A request that uses a block uses all before
    it, so those become idle no earlier, and the block is evicted before them. There is one
    exception: where an earlier block is cached from another request, it may be evicted first. The
    later block is then useless until the earlier one is computed again.

    Attributes:
        observer: is told of every block that comes into the cache or leaves it. The owner may set
            it.
    """

    def __init__(
        self,
        blocks: BlockManager,
        clock: EvictionClock,
        block_tokens: int,
        *,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.block_tokens = block_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.observer: BlockObserver | None = None
        self._blocks = blocks
        self._clock = clock
        self._recompute_cost_ns = recompute_cost_ns(block_tokens)
        self._tables: dict[Hashable, _Table] = {}
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, Priority] = OrderedDict()  # by page id, in order of eviction
        self._forgotten: set[int] = set()  # pages in use that forget() took out of the cache
        self._written: set[bytes] = set()  # hashes of blocks that step `_written_in` writes
        self._written_in = 0

    @property
    def num_idle(self) -> int:
        """Pages that eviction could free."""
        return len(self._idle)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def request_ids(self) -> Iterator[Hashable]:
        """Iterate over the requests that have a page table."""
        return iter(self._tables)

    def page_ids(self, request_id: Hashable) -> list[int]:
        return self._tables[request_id].page_ids

    def find_prefix(self, chain: BlockChain, token_ids: "array[int]") -> Prefix:
        """Find the longest prefix that the step being planned may read.

        It leaves at least one token to compute.
        """
        if not self.enable_prefix_caching:
            return NO_PREFIX
        written = self._written_now()
        page_ids: list[int] = []
        for block in range((len(token_ids) - 1) // self.block_tokens):
            chain.extend(token_ids, block + 1)
            page_id = self._page_of.get(chain.hashes[block])
            if page_id is None:
                break
            if chain.hashes[block] in written:
                return Prefix(page_ids, is_growing=True)
            page_ids.append(page_id)
        return Prefix(page_ids, is_growing=False)

    def _written_now(self) -> set[bytes]:
        """Return the blocks that the step being planned writes so far."""
        if self._written_in != self._blocks.num_planned:
            self._written_in = self._blocks.num_planned
            self._written.clear()
        return self._written

    def num_idle_among(self, page_ids: list[int]) -> int:
        return sum(page_id in self._idle for page_id in page_ids)

    def open(self, request_id: Hashable, chain: BlockChain, prefix: list[int]) -> None:
        """Start a page table with the pages that find_prefix() returned."""
        if request_id in self._tables:
            raise IntegrityError(f"request {request_id!r} already has a page table")
        for page_id in prefix:
            self._blocks.share(page_id)
            self._idle.pop(page_id, None)
        self._tables[request_id] = _Table(chain, list(prefix))

    def grow(self, request_id: Hashable, num_tokens: int) -> list[int]:
        """Append free pages until the table holds `num_tokens`; returns the pages appended."""
        table = self._tables[request_id]
        num_missing = self.num_pages_for(num_tokens) - len(table.page_ids)
        page_ids = self._blocks.allocate(Owner.KV, max(0, num_missing))
        table.page_ids.extend(page_ids)
        return page_ids

    def register_planned(
        self, request_id: Hashable, token_ids: "array[int]", num_scheduled: int
    ) -> None:
        """Cache the full blocks that the step being planned writes.

        Call it for rows that the step is sure to have. Steps planned later may share the blocks.

        Args:
            token_ids: int32, all the request's known tokens.
            num_scheduled: tokens fed by the end of the step; `token_ids` holds all of them.
        """
        self._written_now().update(self._register(request_id, token_ids, num_scheduled))

    def register(self, request_id: Hashable, token_ids: "array[int]", num_computed: int) -> None:
        """Cache the full blocks of the first `num_computed` tokens, which earlier steps wrote."""
        self._register(request_id, token_ids, num_computed)

    def _register(
        self, request_id: Hashable, token_ids: "array[int]", num_tokens: int
    ) -> list[bytes]:
        """Return the hashes that were not cached before."""
        if not self.enable_prefix_caching:
            return []
        table = self._tables[request_id]
        num_full = num_tokens // self.block_tokens
        table.chain.extend(token_ids, num_full)
        added: list[bytes] = []
        for block in range(table.num_registered, num_full):
            key, page_id = table.chain.hashes[block], table.page_ids[block]
            if key not in self._page_of:
                self._page_of[key] = page_id
                self._hash_of[page_id] = key
                added.append(key)
                if self.observer is not None:
                    self.observer.on_stored(table.chain, block, token_ids)
        table.num_registered = max(table.num_registered, num_full)
        return added

    def release(self, request_id: Hashable) -> None:
        """End a page table. Its cached blocks become idle, the last first.

        A block is useful only while all before it are cached, so the last one is evicted first.
        """
        table = self._tables.pop(request_id)
        priority = self._clock.stamp(self._recompute_cost_ns, 1)
        for page_id in reversed(table.page_ids):
            keep = page_id in self._hash_of
            if self._blocks.release(page_id, keep=keep):
                self._forgotten.discard(page_id)
                if keep:
                    self._idle[page_id] = priority

    def forget(self, chain: BlockChain) -> None:
        """Remove a request's blocks from the cache, because their KV may be wrong.

        Requests that use such a block keep its page, and free it in the end. The request itself
        may have a page table or not.
        """
        for key in chain.hashes:
            if key in self._page_of:
                self._forget(key)

    def reset(self) -> None:
        """Remove all blocks from the cache; pages in use stay with their requests."""
        observer, self.observer = self.observer, None
        for key in list(self._page_of):
            self._forget(key)
        self.observer = observer
        if observer is not None:
            observer.on_cleared()

    def _forget(self, key: bytes) -> None:
        page_id = self._page_of[key]
        if page_id in self._idle:
            self.evict(page_id)
        else:
            del self._page_of[key], self._hash_of[page_id]
            self._forgotten.add(page_id)
            if self.observer is not None:
                self.observer.on_removed(key)

    def evict(self, page_id: int) -> None:
        """Remove an idle prefix block from the cache and free its page."""
        del self._idle[page_id]
        key = self._hash_of.pop(page_id)
        del self._page_of[key]
        self._blocks.discard(page_id)
        if self.observer is not None:
            self.observer.on_removed(key)

    def first_idle(self) -> tuple[Priority, int] | None:
        """Return priority and page id of the idle prefix block to evict first."""
        for page_id, priority in self._idle.items():
            return priority, page_id
        return None

    def claims(self) -> Iterator[tuple[int, Owner, int]]:
        """Yield what the block manager must know: (page id, owner, references)."""
        num_refs: dict[int, int] = {}
        for table in self._tables.values():
            for page_id in table.page_ids:
                num_refs[page_id] = num_refs.get(page_id, 0) + 1
        for page_id, count in num_refs.items():
            yield page_id, Owner.KV, count
        for page_id in self._idle:
            yield page_id, Owner.PREFIX, 0

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every shared page is the same block of equal tokens."""
        if {h: p for p, h in self._hash_of.items()} != self._page_of:
            raise IntegrityError("the prefix cache maps a hash and a page differently")
        in_use: set[int] = set()
        for request_id, table in self._tables.items():
            for block, page_id in enumerate(table.page_ids):
                key = self._hash_of.get(page_id)
                if page_id in in_use and key is None and page_id not in self._forgotten:
                    raise IntegrityError(f"page {page_id} is shared but not a prefix block")
                if key is not None and (
                    block >= table.num_registered or table.chain.hashes[block] != key
                ):
                    raise IntegrityError(
                        f"block {block} of request {request_id!r} is page {page_id}, which caches "
                        "other tokens"
                    )
                in_use.add(page_id)
        for page_id in self._hash_of:
            if (page_id in in_use) == (page_id in self._idle):
                raise IntegrityError(f"cached page {page_id} must be either in use or idle")
        if not self._forgotten <= in_use - self._hash_of.keys():
            raise IntegrityError("a forgotten page is free or cached")
        stamps = list(self._idle.values())
        if stamps != sorted(stamps):
            raise IntegrityError("idle prefix blocks are out of order")
        if len(self._idle) > len(self._hash_of):
            raise IntegrityError("an idle page is in no prefix")
