"""Cuts a step's segments into tiles of rows of one adapter. Host side, numpy, once a step."""

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


def make_tiles(starts: Int32Array, slots: Int32Array, block_rows: int) -> Int32Array:
    """Returns tiles of at most `block_rows` rows, int32 [num_tiles, 4]: (slot, first, rows, 0).

    `starts` [num_segments + 1] and `slots` [num_segments] are LoRABatch's. Tiles of one segment
    are adjacent and no tile mixes adapters.
    """
    lengths = np.diff(starts)
    counts = -(-lengths // block_rows)
    segment = np.repeat(np.arange(len(slots)), counts)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    tiles = np.zeros((len(segment), 4), dtype=np.int32)
    tiles[:, 0] = slots[segment]
    tiles[:, 1] = starts[:-1][segment] + within * block_rows
    tiles[:, 2] = np.minimum(block_rows, starts[1:][segment] - tiles[:, 1])
    return tiles


def module_ranks(rank: npt.NDArray[np.int32], slots: Int32Array) -> Int32Array:
    """Returns each module's largest rank in any layer for each slot in `slots`.

    Args:
        rank: int32 [num_layers, num_modules, num_slots], LoRATable's. Other slots cost no time.

    Returns:
        int32 [num_modules, len(slots)].
    """
    ranks: Int32Array = rank[:, :, slots].max(axis=0, initial=0)
    return ranks


def split_ranks(tiles: Int32Array, slot_ranks: Int32Array, block_ranks: int) -> Int32Array:
    """Repeat each tile once for every `block_ranks` ranks of its adapter; column 3 is the first.

    `slot_ranks` [num_slots] holds each adapter's largest rank, so work is in true ranks.
    """
    counts = -(-slot_ranks[tiles[:, 0]] // block_ranks)
    items = np.repeat(tiles, counts, axis=0)
    offsets = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    items[:, 3] = offsets * block_ranks
    return items
