"""Tiles cover every row once, never mix adapters, and cost true ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.backends.lora.tiles import make_tiles, module_ranks, split_ranks

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(lengths, st.sampled_from([1, 2, 8, 16, 64]), st.randoms())
def test_tiles_cover_each_row_once(lengths: list[int], block: int, rng) -> None:
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    slots = np.array(rng.sample(range(1000), len(lengths)), dtype=np.int32)
    tiles = make_tiles(starts, slots, block)
    covered = []
    for slot, first, rows, unused in tiles.tolist():
        assert 1 <= rows <= block and unused == 0
        segment = int(np.searchsorted(starts, first, side="right")) - 1
        assert slots[segment] == slot
        assert first + rows <= starts[segment + 1], "a tile reaches into the next adapter"
        covered += range(first, first + rows)
    assert covered == list(range(starts[-1]))
    assert len(tiles) == sum(-(-length // block) for length in lengths)


@given(lengths, st.randoms())
def test_items_cover_true_ranks_alone(lengths: list[int], rng) -> None:
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    slots = np.array(rng.sample(range(100), len(lengths)), dtype=np.int32)
    ranks = np.zeros(100, dtype=np.int32)
    ranks[slots] = [rng.randint(1, 256) for _ in slots]
    items = split_ranks(make_tiles(starts, slots, 16), ranks, 16)
    for slot in slots.tolist():
        firsts = items[items[:, 0] == slot][:, 3]
        assert set(firsts.tolist()) == set(range(0, int(ranks[slot]), 16))
    assert len(items) == sum(
        -(-length // 16) * -(-int(ranks[slot]) // 16)
        for length, slot in zip(lengths, slots, strict=True)
    )


@pytest.mark.parametrize("slots", [[3], [0, 7, 2], []])
def test_module_ranks(slots: list[int]) -> None:
    rank = np.random.default_rng(0).integers(0, 64, (4, 7, 9)).astype(np.int32)
    ranks = module_ranks(rank, np.array(slots, dtype=np.int32))
    assert ranks.shape == (7, len(slots))
    for module in range(7):
        for index, slot in enumerate(slots):
            assert ranks[module, index] == max(rank[layer, module, slot] for layer in range(4))
