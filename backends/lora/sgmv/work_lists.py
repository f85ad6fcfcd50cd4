"""The work lists of one plan for the Triton SGMV kernels. Host side, numpy."""

import numpy as np

from loraplex.backends.lora.contract import Int32Array, LoRABatch
from loraplex.backends.lora.tiles import make_tiles, split_ranks


class WorkLists:
    """The lists of items and tiles of a plan. Groups that need equal lists share one.

    `items` and `tiles` return the number of entries and where they start in the plan's metadata.
    """

    def __init__(self, batch: LoRABatch, at: int) -> None:
        self._batch = batch
        self._segments = np.arange(len(batch.segment_slots), dtype=np.int32)
        self._at = at
        self._tiles: dict[int, Int32Array] = {}  # rows of a tile: tiles, segments in column 0
        self._placed: dict[tuple[int, int, bytes], tuple[int, int]] = {}
        self.arrays: list[Int32Array] = []

    def tiles(self, block_rows: int) -> tuple[int, int]:
        """Tiles of at most `block_rows` rows: (slot, first row, rows, 0)."""
        key = (block_rows, 0, b"")
        if key not in self._placed:
            self._place(key, self._cut(block_rows))
        return self._placed[key]

    def items(self, block_rows: int, block_ranks: int, ranks: Int32Array) -> tuple[int, int]:
        """Tiles times blocks of ranks: (slot, first row, rows, first rank).

        Args:
            ranks: int32 [segments], of all modules of the group together.
        """
        key = (block_rows, block_ranks, (-(-ranks // block_ranks)).tobytes())
        if key not in self._placed:
            self._place(key, split_ranks(self._cut(block_rows), ranks, block_ranks))
        return self._placed[key]

    def _cut(self, block_rows: int) -> Int32Array:
        if block_rows not in self._tiles:
            starts = self._batch.segment_starts
            self._tiles[block_rows] = make_tiles(starts, self._segments, block_rows)
        return self._tiles[block_rows]

    def _place(self, key: tuple[int, int, bytes], entries: Int32Array) -> None:
        entries = entries.copy()
        entries[:, 0] = self._batch.segment_slots[entries[:, 0]]
        self._placed[key] = (len(entries), self._at)
        self.arrays.append(entries.ravel())
        self._at += entries.size
