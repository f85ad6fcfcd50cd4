"""The allocator of chunks in a few large slabs. It holds integers only, no memory."""

from bisect import bisect_left
from dataclasses import dataclass

from loraplex.memory.accounting.block_manager import IntegrityError

CHUNK_ALIGN = 512
"""Chunks start at multiples of so many bytes, so that no two adapters share a cache line."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes `offset .. offset + num_bytes - 1` of one slab, a multiple of CHUNK_ALIGN long."""

    slab_id: int
    offset: int
    num_bytes: int


class SlabAllocator:
    """Allocates first fit in the oldest slab, so that younger ones empty."""

    def __init__(self) -> None:
        self._slab_bytes: dict[int, int] = {}  # by slab id, oldest first
        self._spans: dict[int, list[tuple[int, int]]] = {}  # free spans: (offset, bytes), sorted
        self._chunks: set[Chunk] = set()
        self._num_created = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(self._slab_bytes.values())

    @property
    def num_free_bytes(self) -> int:
        return sum(size for spans in self._spans.values() for _, size in spans)

    def num_fitting(self, num_bytes: int) -> int:
        """Return how many chunks of this size fit now."""
        size = _chunk_bytes(num_bytes)
        return sum(length // size for spans in self._spans.values() for _, length in spans)

    def add_slab(self, num_bytes: int) -> int:
        """Add a slab, all of it free; returns its id."""
        slab_id = self._num_created
        self._num_created += 1
        self._slab_bytes[slab_id] = num_bytes
        self._spans[slab_id] = [(0, num_bytes)]
        return slab_id

    def remove_slab(self, slab_id: int) -> None:
        """Remove a slab; raises IntegrityError if a chunk of it is in use."""
        if not self.is_empty(slab_id):
            raise IntegrityError(f"slab {slab_id} is in use")
        del self._slab_bytes[slab_id], self._spans[slab_id]

    def is_empty(self, slab_id: int) -> bool:
        return self._spans[slab_id] == [(0, self._slab_bytes[slab_id])]

    def empty_slabs(self) -> list[int]:
        return [slab_id for slab_id in self._slab_bytes if self.is_empty(slab_id)]

    def allocate(self, num_bytes: int) -> Chunk | None:
        """Allocate a chunk of at least `num_bytes`; returns None if no free span is as long."""
        size = _chunk_bytes(num_bytes)
        for slab_id, spans in self._spans.items():
            for index, (offset, length) in enumerate(spans):
                if length >= size:
                    rest = [(offset + size, length - size)] if length > size else []
                    spans[index : index + 1] = rest
                    chunk = Chunk(slab_id, offset, size)
                    self._chunks.add(chunk)
                    return chunk
        return None

    def free(self, chunk: Chunk) -> None:
        """Free a chunk; raises IntegrityError if it is not allocated."""
        if chunk not in self._chunks:
            raise IntegrityError(f"{chunk} is not allocated")
        self._chunks.remove(chunk)
        spans = self._spans[chunk.slab_id]
        start, end = chunk.offset, chunk.offset + chunk.num_bytes
        index = bisect_left(spans, (start, 0))
        first = last = index
        if index and sum(spans[index - 1]) == start:
            first, start = index - 1, spans[index - 1][0]
        if index < len(spans) and spans[index][0] == end:
            last, end = index + 1, sum(spans[index])
        spans[first:last] = [(start, end - start)]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless chunks and merged free spans cover each slab exactly."""
        for slab_id, num_bytes in self._slab_bytes.items():
            free = self._spans[slab_id]
            used = [(c.offset, c.num_bytes) for c in self._chunks if c.slab_id == slab_id]
            end = 0
            for offset, size in sorted([*free, *used]):
                if offset != end or size < 1:
                    raise IntegrityError(f"slab {slab_id} has a hole or an overlap at {end}")
                end = offset + size
            if end != num_bytes:
                raise IntegrityError(f"slab {slab_id} ends at {end}, not at {num_bytes}")
            ends = {offset + size for offset, size in free}
            if free != sorted(free) or ends & {offset for offset, _ in free}:
                raise IntegrityError(f"free spans of slab {slab_id} are not sorted and merged")
        if {chunk.slab_id for chunk in self._chunks} - set(self._slab_bytes):
            raise IntegrityError("a chunk lies in no slab")


def _chunk_bytes(num_bytes: int) -> int:
    return max(1, -(-num_bytes // CHUNK_ALIGN)) * CHUNK_ALIGN
