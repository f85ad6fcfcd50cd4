"""Launches of TritonSGMV for few rows depend on their number alone, and its plans add up."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from loraplex.backends.lora.contract import apply_lora
from loraplex.backends.lora.sgmv import launch
from loraplex.backends.lora.sgmv.blocks import ShrinkBlocks, Tuned, rank_class, shrink_blocks
from loraplex.backends.lora.sgmv.launch import HEADER_INTS
from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV

from helpers.kernels.lora_cases import (
    POPULARITIES,
    draw_slots,
    make_batch,
    make_case,
    make_shapes,
    make_spec,
)

ADAPTERS = [[{m: r for m in range(7)}] for r in (1, 8, 16, 17, 64)] + [[{0: 3, 5: 9}]]
CASE = make_case(ADAPTERS, make_shapes(96, 120, 40, 200), dtype=torch.float32)


class Recorder:
    """Stands in for a kernel."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
            self.launches.append((grid, pointers, options))

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(launch, "shrink_kernel", made)
    monkeypatch.setattr(launch, "expand_kernel", made)
    return made


@pytest.mark.parametrize("num_rows", [1, 33, 1024])
def test_launches_depend_on_rows_alone(recorder: Recorder, num_rows: int) -> None:
    op = TritonSGMV(make_spec(CASE, 2048))
    x = torch.empty(num_rows, 200)
    seen = []
    for seed, popularity in enumerate(POPULARITIES):
        slots = draw_slots(popularity, max(1, num_rows - seed), CASE.num_adapters, seed)
        plan = op.plan_graph(table=CASE.table, batch=make_batch(slots), kind="sgmv")
        recorder.launches.clear()
        for group in CASE.groups:
            y = torch.empty(1).as_strided((num_rows, sum(group.out_features)), (0, 0))
            apply_lora(
                op, plan, y=y[:, :], x=x[:, : group.in_features], pool=CASE.pool, layer=0,
                group=group,
            )  # fmt: skip
        seen.append(
            [
                (grid, [p for i, p in enumerate(pointers) if i > 0], options)
                for grid, pointers, options in recorder.launches
            ]
        )
    assert len(seen[0]) == 8 and all(launches == seen[0] for launches in seen)


@pytest.mark.parametrize("lengths", [(1,), (3, 1, 40), (600,), (700, 1, 5, 64, 65, 2)], ids=str)
def test_units_cover_rows_ranks_and_features_once(lengths: tuple[int, ...]) -> None:
    op = TritonSGMV(make_spec(CASE, 2048))
    slots = [2 * i + 1 for i, length in enumerate(lengths) for _ in range(length)]
    batch = make_batch(slots)
    plan = op.plan(table=CASE.table, batch=batch)
    meta = plan.meta.numpy()
    assert (meta[HEADER_INTS * len(CASE.groups) :][: len(slots)] == batch.token_order).all()
    for index, group in enumerate(CASE.groups):
        header = meta[index * HEADER_INTS :][:HEADER_INTS]
        items_at, tiles_at, splits, chunks = header[1], header[3], header[4], header[5]
        blocks = plan.launches[group.modules[0]][0]
        assert splits * chunks * 64 >= group.in_features > (splits - 1) * chunks * 64
        items = meta[items_at:][: 4 * header[0]].reshape(-1, 4)
        tiles = meta[tiles_at:][: 4 * header[2]].reshape(-1, 4)
        of_row = np.array(slots)[batch.token_order]
        flat = CASE.table.host_rank.numpy()[0, list(group.modules)].sum(axis=0)
        covered = np.zeros((len(slots), flat.max() + 128), dtype=int)
        for slot, first, rows, rank in items:
            assert rows <= blocks.shrink.rows and (of_row[first : first + rows] == slot).all()
            covered[first : first + rows, rank : rank + blocks.item_ranks] += 1
        for row, slot in enumerate(of_row):
            assert (covered[row, : flat[slot]] == 1).all()
        once = np.zeros(len(slots), dtype=int)
        for slot, first, rows, _ in tiles:
            assert rows <= blocks.expand.rows and (of_row[first : first + rows] == slot).all()
            once[first : first + rows] += 1
        assert (once == 1).all()
        needed = int(splits) * len(slots) * len(group.modules) * int(header[7])
        assert needed <= op.scratch.numel(), "the splits do not fit into scratch memory"


def test_every_row_another_adapter_of_the_largest_rank_fits() -> None:
    case = make_case([[{m: 256 for m in range(7)}]] * 40, make_shapes(64, 64, 64, 64),
                     dtype=torch.float16, page_elems=4096)  # fmt: skip
    op = TritonSGMV(make_spec(case, 40))
    op.plan(table=case.table, batch=make_batch([2 * i + 1 for i in range(40)]))


def test_an_empty_plan_leaves_no_work() -> None:
    op = TritonSGMV(make_spec(CASE, 64))
    op.plan(table=CASE.table, batch=make_batch([1, 3]))
    plan = op.plan(table=CASE.table, batch=make_batch([-1, -1]))
    headers = plan.meta.numpy()[: HEADER_INTS * len(CASE.groups)].reshape(-1, HEADER_INTS)
    assert not headers[:, [0, 2]].any()


def test_blocks_are_those_measured_for_the_nearest_size() -> None:
    small, large = ShrinkBlocks(32, 32, 1, 2, 3), ShrinkBlocks(64, 64, 1, 2, 3)
    tuned = Tuned(shrink={("prefill", 16, 576): small, ("prefill", 16, 14336): large})
    assert shrink_blocks(tuned, "prefill", 16, 1536) == small
    assert shrink_blocks(tuned, "prefill", 16, 4096) == large
    for unmeasured in (("decode", 16), ("prefill", 64)):
        assert shrink_blocks(tuned, *unmeasured, 4096) == shrink_blocks(Tuned(), *unmeasured, 4096)
    assert [rank_class("prefill", rank) for rank in (1, 16, 17, 64, 65, 256)] == [
        16, 16, 32, 64, 256, 256,
    ]  # fmt: skip
