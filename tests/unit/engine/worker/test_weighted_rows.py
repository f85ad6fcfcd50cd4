"""Table rows of weighted adapters: shared, freed, and written on both sides of the table."""

import random

import numpy as np
import torch

from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.contract import LoRATable
from loraplex.engine.worker.adapters.weighted_rows import WeightedRows
from loraplex.engine.worker.request_states import RequestStates
from loraplex.engine.worker.step_rows import make_rows
from loraplex.scheduler.worker_protocol import (
    AdapterBinding,
    NewRequest,
    SamplingSpec,
    StepPlan,
    int_array,
)

from helpers.running.step_driver import GREEDY

NUM_SLOTS, NUM_WEIGHTED = 3, 4
CPU = torch.device("cpu")


def make_table() -> LoRATable:
    """A table whose fields hold the number of their row, and 100 more on the device."""
    row = torch.arange(NUM_SLOTS + NUM_WEIGHTED, dtype=torch.int32)
    row[NUM_SLOTS:] = 0
    whole = row.expand(2, 7, -1)
    pages = row[:, None].repeat(1, 5)

    def sides(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return values.contiguous() + 100, values.clone()

    scale, host_scale = sides(whole.float())
    names = ("rank", "a_start", "b_start", "gain_start", "shift_start")
    fields = {name: sides(whole) for name in names}
    page_table, host_page_table = sides(pages)
    return LoRATable(
        page_table=page_table,
        host_page_table=host_page_table,
        scale=scale,
        host_scale=host_scale,
        host_has_vectors=row == 2,
        **{name: device for name, (device, _) in fields.items()},
        **{f"host_{name}": host for name, (_, host) in fields.items()},
    )


def flush(rows: WeightedRows) -> None:
    rows.write(Uploader(CPU).upload(rows.take_new()))


def test_a_row_is_the_slots_with_another_scale() -> None:
    table = make_table()
    rows = WeightedRows(table, NUM_SLOTS)
    row = rows.acquire(2, -0.5)
    assert row >= NUM_SLOTS
    flush(rows)
    for name in ("rank", "a_start", "b_start", "gain_start", "shift_start"):
        assert (getattr(table, name)[..., row] == 102).all()
        assert (getattr(table, f"host_{name}")[..., row] == 2).all()
    assert (table.scale[..., row] == -51).all() and (table.host_scale[..., row] == -1).all()
    assert (table.page_table[row] == 102).all() and (table.host_page_table[row] == 2).all()
    assert table.host_has_vectors.nonzero().flatten().tolist() == [2, row]
    assert (table.scale[..., :NUM_SLOTS] == torch.tensor([100.0, 101, 102])).all()
    assert rows.acquire(1, 1.0) == 1 and rows.acquire(2, -0.5) == row


def test_rows_are_shared_while_used_and_read_anew_afterwards() -> None:
    """The oracle counts the uses of each pair."""
    rng = random.Random(1)
    table = make_table()
    rows = WeightedRows(table, NUM_SLOTS)
    pairs = [(slot, weight) for slot in range(3) for weight in (0.5, 2.0)]
    used: list[tuple[tuple[int, float], int]] = []
    for turn in range(300):
        held = {pair for pair, _ in used}
        free = [p for p in pairs if p in held or len(held) < NUM_WEIGHTED]
        if used and rng.random() < 0.5:
            _, row = used.pop(rng.randrange(len(used)))
            rows.release(row)
        else:
            pair = rng.choice(free)
            table.rank[..., pair[0]] = table.host_rank[..., pair[0]] = turn
            expected = next((row for other, row in used if other == pair), None)
            row = rows.acquire(*pair)
            flush(rows)
            assert row == expected if expected is not None else table.rank[0, 0, row] == turn
            used.append((pair, row))
        by_row = {row: pair for pair, row in used}
        assert len(by_row) == len({pair for pair, _ in used}), "two pairs have one row"


def make_states() -> RequestStates:
    return RequestStates(
        max_num_seqs=4, max_model_len=64, block_tokens=8, vocab_size=50, device=CPU,
        weighted_rows=WeightedRows(make_table(), NUM_SLOTS),
    )  # fmt: skip


def make_plan(
    bindings: dict[int, list[AdapterBinding]], rows: list[tuple[int, int, int]], freed: tuple = ()
) -> StepPlan:
    """`bindings` are those of new requests by slot; `rows` are (slot, position, tokens)."""
    new = [
        NewRequest(slot, int_array(range(60)), 60, int_array(), of_slot, SamplingSpec(**GREEDY))
        for slot, of_slot in bindings.items()
    ]
    columns = [int_array(values) for values in zip(*rows, strict=True)]
    return StepPlan(
        0, int_array(freed), new, int_array(), int_array(), *columns, int_array([0] * len(rows))
    )


def token_rows(states: RequestStates, plan: StepPlan) -> list[list[int]]:
    """Returns for each batch the table row of every token, -1 without one."""
    states.apply(plan)
    found = []
    for batch in states.adapter_batches(make_rows(plan)):
        of_token = np.full(batch.num_tokens, -1)
        for index, slot in enumerate(batch.segment_slots):
            start, end = batch.segment_starts[index : index + 2]
            of_token[batch.token_order[start:end]] = slot
        found.append(of_token.tolist())
    return found


def test_batches_of_a_step() -> None:
    states = make_states()
    bindings = {
        0: [],
        1: [AdapterBinding(2)],
        2: [AdapterBinding(0), AdapterBinding(1, 0.5)],
        3: [AdapterBinding(1, first_position=10), AdapterBinding(2, first_position=12)],
    }
    rows = [(0, 5, 1), (1, 0, 2), (2, 3, 2), (3, 8, 6)]
    (first, second) = token_rows(states, make_plan(bindings, rows))
    (weighted,) = {row for row in second if row >= NUM_SLOTS}
    assert first == [-1, 2, 2, 0, 0, -1, -1, 1, 1, 1, 1]
    assert second == [-1, -1, -1, weighted, weighted, -1, -1, -1, -1, 2, 2]
    # Before the first positions nothing is left of the second batch but the other request's.
    assert len(token_rows(states, make_plan({}, [(0, 6, 1), (1, 2, 1), (3, 0, 4)]))) == 1
    assert token_rows(states, make_plan({}, [(3, 0, 4)])) == [[-1] * 4]
    # Another request in the slot of a mix has none of its adapters.
    assert token_rows(states, make_plan({2: [AdapterBinding(2)]}, [(2, 0, 1)], (2,))) == [[2]]
