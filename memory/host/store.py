"""The host store: packed adapters in host memory, the tier between disk and pages.

A GPU copies at full speed from page-locked memory only, and page-locking a slab takes a tenth of a
second or two. So the store allocates memory in slabs (memory/host/slab.py), ahead of need, and
places adapters within them.
"""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from loraplex.memory.host.slab import plain_slab
from loraplex.memory.host.slab_allocator import CHUNK_ALIGN, Chunk, SlabAllocator
from loraplex.memory.vocabulary_part import VocabularyParts

logger = logging.getLogger("loraplex")

SLAB_BYTES = 256 << 20

NUM_SPARE = 2
"""Number of adapters that may be read while a slab is allocated."""

GROW_AGAIN_S = 10.0
"""Seconds for which the store asks for no further slab after the host had no memory for one."""

Allocate = Callable[[int], torch.Tensor]
"""Allocates uint8 [number of bytes], uninitialized."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter of L layers in page layout (memory/adapter_layout.py), ready to be copied into
    pages. Of M modules those that it does not change have rank 0."""

    content_hash: str
    num_pages: int
    data: torch.Tensor  # [L, num_pages * page_elems] of the model's dtype; page-locked for a GPU
    rank: torch.Tensor  # int32 [L, M]
    a_start: torch.Tensor  # int32 [L, M]; see Segment.first
    b_start: torch.Tensor  # int32 [L, M]; see Segment.first
    gain_start: torch.Tensor  # int32 [L, M]; 0: the module has no gain
    shift_start: torch.Tensor  # int32 [L, M]; 0: the module has no shift
    scale: torch.Tensor  # float32 [L, M]; holds the scale of A and B in e4m3, too
    replaces_bias: bool = False  # its shifts come in place of the base model's biases
    vocabulary: VocabularyParts = VocabularyParts()

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @property
    def kind(self) -> str:
        """ "lora" or "dora", then any of "+bias", "+embedding", "+head", "+tokens"."""
        is_dora = bool(self.gain_start.any())
        has_bias = bool(self.shift_start.any()) and (self.replaces_bias or not is_dora)
        return ("dora" if is_dora else "lora") + "+bias" * has_bias + self.vocabulary.kinds

    @property
    def has_vectors(self) -> bool:
        return bool(self.gain_start.any() or self.shift_start.any())


class MemoryInUseError(RuntimeError):
    """Reading failed, and something may still write into the memory of that read."""


@dataclass(slots=True)
class _Entry:
    adapter: PackedAdapter
    chunks: list[Chunk]
    num_users: int = 0
    is_dropped: bool = False  # is evicted with its last user


class HostStore:
    """Keeps adapters and evicts the least recently used. Safe to use from several threads.

    An adapter stays while a load uses it (`acquire` to `release`). An adapter that does not fit the
    budget beside those in use gets a slab beyond the budget, as it is about to be loaded. That slab
    is freed when another adapter is added after its use.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        make_slab: Allocate = plain_slab,
        slab_bytes: int = SLAB_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make_slab` raises MemoryError, OSError or RuntimeError where the host has too little."""
        self._clock = clock
        self._grows_from = -math.inf  # time before which no slab within the budget is asked for
        self._budget_bytes = budget_bytes
        self._make_slab = make_slab
        self._slab_bytes = min(slab_bytes, budget_bytes) // CHUNK_ALIGN * CHUNK_ALIGN
        self._space = SlabAllocator()
        self._slabs: dict[int, torch.Tensor] = {}  # uint8
        self._extra_slabs: set[int] = set()  # beyond the budget
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._writing: set[Chunk] = set()
        self._largest = 0  # bytes of the largest chunk so far
        self._evicted: list[str] = []
        self._dropped: list[torch.Tensor] = []  # slabs to free once the lock is released
        self._lock = threading.Lock()
        self._growing = threading.Lock()  # taken before _lock; one thread at a time page-locks

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters; slabs are larger."""
        with self._lock:
            return sum(entry.adapter.num_bytes for entry in self._entries.values())

    @property
    def num_slab_bytes(self) -> int:
        return self._space.num_bytes

    @property
    def num_in_use(self) -> int:
        """Number of adapters between `acquire` and `release`."""
        with self._lock:
            return sum(entry.num_users > 0 for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._entries

    def add(
        self, read: Callable[[Allocate], PackedAdapter], *, acquire: bool = False
    ) -> PackedAdapter:
        """Add the adapter that `read` returns, and evict others to make room.

        If the store has an equal adapter already, it keeps and returns that copy. If `read` raises,
        its memory is freed and the error is raised. After a MemoryInUseError the memory is lost.

        Raises:
            MemoryError: the host has no more memory and every adapter here is in use.
        """
        chunks: list[Chunk] = []
        try:
            adapter = read(lambda num_bytes: self._allocate(num_bytes, chunks))
        except MemoryInUseError:
            raise
        except BaseException:
            with self._locked():
                self._free(chunks)
            raise
        with self._locked():
            entry = self._entries.get(adapter.content_hash)
            if entry is None:
                self._writing.difference_update(chunks)
                entry = self._entries[adapter.content_hash] = _Entry(adapter, chunks)
            else:
                self._free(chunks)
                self._entries.move_to_end(adapter.content_hash)
            entry.num_users += acquire
            entry.is_dropped = False
            self._evict_extra(keep=adapter.content_hash)
            return entry.adapter

    def acquire(self, content_hash: str) -> PackedAdapter | None:
        """Return the adapter and keep it until `release`; None if it is not here."""
        with self._lock:
            entry = self._entries.get(content_hash)
            if entry is None:
                return None
            self._entries.move_to_end(content_hash)
            entry.num_users += 1
            entry.is_dropped = False
            return entry.adapter

    def release(self, content_hash: str) -> None:
        """End one use of the adapter; raises ValueError if there is none."""
        with self._locked():
            entry = self._entries.get(content_hash)
            if entry is None or not entry.num_users:
                raise ValueError(f"adapter {content_hash} is released without a use")
            entry.num_users -= 1
            if entry.is_dropped and not entry.num_users:
                self._drop(content_hash)

    def drop(self, content_hash: str) -> None:
        """Free an adapter's memory, if it is here.

        An adapter in use is freed with its last `release`, unless it is asked for again. One empty
        slab is kept, others are freed.
        """
        with self._locked():
            entry = self._entries.get(content_hash)
            if entry is None:
                return
            entry.is_dropped = True
            if not entry.num_users:
                self._drop(content_hash)

    def take_evicted(self) -> list[str]:
        """Return the content hashes evicted since the last call, in order."""
        with self._lock:
            evicted, self._evicted = self._evicted, []
            return evicted

    def prepare(self) -> None:
        """Allocate the next slab before it is needed.

        Does so if NUM_SPARE adapters as large as the largest so far do not fit and the budget has
        room. May take long: call it from a thread of its own.
        """
        with self._growing:
            with self._lock:
                is_short = self._space.num_fitting(self._largest) < NUM_SPARE
            if is_short:
                self._grow(max(self._slab_bytes, self._largest), may_exceed_budget=False)

    def check_integrity(self) -> None:
        """Raise IntegrityError or AssertionError unless chunks, slabs and adapters agree."""
        with self._lock:
            self._space.check_integrity()
            chunks = [chunk for entry in self._entries.values() for chunk in entry.chunks]
            chunks += self._writing
            used = sum(chunk.num_bytes for chunk in chunks)
            assert len(set(chunks)) == len(chunks)
            assert used == self._space.num_bytes - self._space.num_free_bytes
            assert sum(slab.nbytes for slab in self._slabs.values()) == self._space.num_bytes
            extra = sum(self._slabs[slab_id].nbytes for slab_id in self._extra_slabs)
            assert self._space.num_bytes - extra <= self._budget_bytes
            assert all(entry.num_users >= 0 for entry in self._entries.values())
            for entry in self._entries.values():
                assert sum(c.num_bytes for c in entry.chunks) >= entry.adapter.num_bytes

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock while something is dropped.

        Slabs are freed after it was released: the kernel takes long to unmap a large one, and
        other threads would wait.
        """
        with self._lock:
            yield
            dropped, self._dropped = self._dropped, []
        dropped.clear()

    def _allocate(self, num_bytes: int, chunks: list[Chunk]) -> torch.Tensor:
        chunk = self._take(num_bytes)
        if chunk is None:
            with self._growing:
                chunk = self._take_slowly(num_bytes)
        chunks.append(chunk)
        return self._slabs[chunk.slab_id][chunk.offset : chunk.offset + num_bytes]

    def _take(self, num_bytes: int) -> Chunk | None:
        with self._lock:
            chunk = self._space.allocate(num_bytes)
            if chunk is not None:
                self._writing.add(chunk)
                self._largest = max(self._largest, chunk.num_bytes)
            return chunk

    def _take_slowly(self, num_bytes: int) -> Chunk:
        """Allocate a slab within the budget, else evict others, else exceed the budget."""
        size = -(-num_bytes // CHUNK_ALIGN) * CHUNK_ALIGN
        while (chunk := self._take(num_bytes)) is None:
            if self._grow(max(self._slab_bytes, size), may_exceed_budget=False):
                continue
            with self._locked():
                if self._drop_empty_slabs() or self._evict_oldest():
                    continue
            if not self._grow(size, may_exceed_budget=True):
                raise MemoryError(
                    f"the host has no {size} bytes of memory for an adapter, and all bytes of the "
                    f"store ({self._space.num_bytes}) are in use: lower adapter_host_bytes"
                )
        return chunk

    def _grow(self, num_bytes: int, *, may_exceed_budget: bool) -> bool:
        """Add a slab; returns whether it could. The caller holds `_growing` and not `_lock`."""
        is_extra = self._space.num_bytes + num_bytes > self._budget_bytes
        if num_bytes < 1 or (is_extra and not may_exceed_budget):
            return False
        if not may_exceed_budget and self._clock() < self._grows_from:
            return False
        try:
            slab = self._make_slab(num_bytes)
        except (MemoryError, OSError, RuntimeError) as error:
            self._grows_from = self._clock() + GROW_AGAIN_S
            logger.warning(
                "the host has no more memory for adapters: the store keeps to %d bytes for %g s "
                "(%s)",
                self._space.num_bytes,
                GROW_AGAIN_S,
                error,
            )
            return False
        with self._lock:
            slab_id = self._space.add_slab(num_bytes)
            self._slabs[slab_id] = slab
            if is_extra:
                self._extra_slabs.add(slab_id)
        return True

    def _drop_empty_slabs(self) -> bool:
        """Drop empty slabs that were too small, so that a larger one fits the budget."""
        slab_ids = self._space.empty_slabs()
        for slab_id in slab_ids:
            self._drop_slab(slab_id)
        return bool(slab_ids)

    def _drop_slab(self, slab_id: int) -> None:
        self._space.remove_slab(slab_id)
        self._dropped.append(self._slabs.pop(slab_id))
        self._extra_slabs.discard(slab_id)

    def _evict_oldest(self) -> bool:
        for content_hash, entry in self._entries.items():
            if not entry.num_users:
                self._evict(content_hash)
                return True
        return False

    def _evict(self, content_hash: str) -> None:
        self._free(self._entries.pop(content_hash).chunks)
        self._evicted.append(content_hash)

    def _drop(self, content_hash: str) -> None:
        self._evict(content_hash)
        for slab_id in self._space.empty_slabs()[1:]:
            self._drop_slab(slab_id)

    def _evict_extra(self, keep: str) -> None:
        """Bring the store back into its budget, as far as adapters are not in use."""
        if self._extra_slabs:
            for content_hash, entry in list(self._entries.items()):
                is_extra = any(chunk.slab_id in self._extra_slabs for chunk in entry.chunks)
                if is_extra and not entry.num_users and content_hash != keep:
                    self._evict(content_hash)

    def _free(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._writing.discard(chunk)
            self._space.free(chunk)
            if chunk.slab_id in self._extra_slabs and self._space.is_empty(chunk.slab_id):
                self._drop_slab(chunk.slab_id)
