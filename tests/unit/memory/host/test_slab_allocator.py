"""Chunks within slabs: nothing overlaps, nothing is lost, neighbours coalesce."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.memory.host.slab_allocator import CHUNK_ALIGN, Chunk, SlabAllocator

UNIT = CHUNK_ALIGN


def test_first_fit_and_coalescing() -> None:
    space = SlabAllocator()
    assert space.allocate(1) is None and space.num_fitting(1) == 0
    first, second = space.add_slab(4 * UNIT), space.add_slab(2 * UNIT)
    a, b, c = (space.allocate(size) for size in (1, UNIT + 1, UNIT))
    assert (a, b) == (Chunk(first, 0, UNIT), Chunk(first, UNIT, 2 * UNIT))
    assert c == Chunk(first, 3 * UNIT, UNIT)
    assert space.allocate(2 * UNIT) == Chunk(second, 0, 2 * UNIT)
    assert space.allocate(1) is None and space.num_free_bytes == 0
    for chunk in (a, c, b):  # b joins both its neighbours
        space.free(chunk)
        space.check_integrity()
    assert space.empty_slabs() == [first]
    assert [space.num_fitting(n * UNIT) for n in (1, 2, 3, 4, 5)] == [4, 2, 1, 1, 0]
    with pytest.raises(IntegrityError, match="not allocated"):
        space.free(a)
    with pytest.raises(IntegrityError, match="in use"):
        space.remove_slab(second)
    space.remove_slab(first)
    assert space.num_bytes == 2 * UNIT
    assert space.add_slab(UNIT) not in (first, second)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("slab"), st.integers(1, 12)),
        st.tuples(st.just("allocate"), st.integers(1, 5 * UNIT)),
        st.tuples(st.just("free"), st.integers(0, 99)),
        st.tuples(st.just("drop"), st.integers(0, 99)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_books_balance_after_every_step(steps: list[tuple[str, int]]) -> None:
    """Against a map of every unit of every slab to the chunk that owns it."""
    space = SlabAllocator()
    units: dict[int, list[Chunk | None]] = {}
    chunks: list[Chunk] = []
    for action, number in steps:
        if action == "slab":
            units[space.add_slab(number * UNIT)] = [None] * number
        elif action == "allocate":
            size = -(-number // UNIT)
            fits = any(run >= size for owners in units.values() for run in _free_runs(owners))
            chunk = space.allocate(number)
            assert (chunk is not None) == fits
            if chunk is not None:
                assert chunk.num_bytes == size * UNIT and chunk.offset % UNIT == 0
                mine = slice(chunk.offset // UNIT, chunk.offset // UNIT + size)
                assert units[chunk.slab_id][mine] == [None] * size
                units[chunk.slab_id][mine] = [chunk] * size
                chunks.append(chunk)
        elif action == "free" and chunks:
            chunk = chunks.pop(number % len(chunks))
            owners = units[chunk.slab_id]
            owners[:] = [None if owner == chunk else owner for owner in owners]
            space.free(chunk)
        elif action == "drop" and units:
            slab_id = sorted(units)[number % len(units)]
            if space.is_empty(slab_id):
                space.remove_slab(slab_id)
                assert units.pop(slab_id).count(None) >= 1
        space.check_integrity()
        runs = [run for owners in units.values() for run in _free_runs(owners)]
        for size in (1, 2, 3):
            fitting = space.num_fitting(size * UNIT - 1)
            assert fitting == sum(run // size for run in runs)
        assert space.num_free_bytes == UNIT * sum(runs)
        empty = [slab_id for slab_id, owners in units.items() if not any(owners)]
        assert space.empty_slabs() == empty


def _free_runs(owners: list[Chunk | None]) -> list[int]:
    text = "".join(" " if owner is None else "x" for owner in owners)
    return [len(run) for run in text.split("x") if run]


def test_integrity_check_can_fail() -> None:
    space = SlabAllocator()
    slab_id = space.add_slab(4 * UNIT)
    space.allocate(UNIT)
    for spans in ([(0, 4 * UNIT)], [(2 * UNIT, 2 * UNIT)], [(UNIT, UNIT), (2 * UNIT, 2 * UNIT)]):
        space._spans[slab_id] = spans
        with pytest.raises(IntegrityError):
            space.check_integrity()
