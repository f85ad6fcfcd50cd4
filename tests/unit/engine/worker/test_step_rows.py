"""A step's rows on the CPU, and the ladder of decode graphs."""

import itertools

import numpy as np
import pytest

from loraplex.engine.worker.graphs.decode import MAX_GRAPH_ROWS, decode_ladder
from loraplex.engine.worker.step_rows import make_rows, token_inputs
from loraplex.scheduler.worker_protocol import StepPlan, int_array


def make_plan(rows: list[tuple[int, int, int, int]]) -> StepPlan:
    """Rows of (slot, position, number of tokens, samples)."""
    empty = int_array()
    columns = [int_array(list(column)) for column in zip(*rows, strict=True)] or [empty] * 4
    return StepPlan(0, empty, [], empty, empty, *columns)


@pytest.mark.parametrize("seed", range(8))
def test_token_inputs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    block, num_slots, max_tokens = int(rng.integers(1, 5)), 9, 40
    page_table = rng.integers(1, 1000, size=(num_slots, 40)).astype(np.int32)
    slots = rng.permutation(num_slots)[: int(rng.integers(1, num_slots))].tolist()
    plan = [(s, int(rng.integers(0, 20)), int(rng.integers(1, 8)), s % 2) for s in slots]
    rows = make_rows(make_plan(plan))
    inputs = token_inputs(rows, page_table, block_tokens=block, max_tokens=max_tokens)
    expected = [(s, p) for s, first, count, _ in plan for p in range(first, first + count)]
    assert inputs.places.tolist() == [s * max_tokens + p for s, p in expected]
    assert inputs.positions.tolist() == [p for _, p in expected]
    assert inputs.kv_rows.tolist() == [
        int(page_table[s, p // block]) * 2 * block + p % block for s, p in expected
    ]
    assert inputs.places.dtype == inputs.positions.dtype == inputs.kv_rows.dtype == np.int64
    assert rows.next_positions.tolist() == [p + n for _, p, n, samples in plan if samples]
    assert rows.kv_lens.tolist() == [p + n for _, p, n, _ in plan]


def test_decode_steps_are_known_as_such() -> None:
    assert make_rows(make_plan([(3, 7, 1, 1), (1, 9, 1, 1)])).is_decode
    assert not make_rows(make_plan([(3, 7, 1, 1), (1, 9, 2, 1)])).is_decode
    assert not make_rows(make_plan([(3, 7, 1, 1), (1, 9, 1, 0)])).is_decode
    assert make_rows(make_plan([(3, 7, 1, 1), (1, 9, 2, 1), (2, 0, 1, 1)])).num_decodes == 1
    assert make_rows(make_plan([(3, 7, 1, 1)])).num_decodes == 1


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 100, 256, 300, 512, 600])
def test_the_ladder_reaches_the_limit(max_rows: int) -> None:
    ladder = decode_ladder(max_rows)
    assert ladder == sorted(set(ladder)) and ladder[0] == 1
    assert ladder[-1] == min(max_rows, MAX_GRAPH_ROWS)
    for before, after in itertools.pairwise(ladder):
        assert after <= max(2 * before, before + 32)
