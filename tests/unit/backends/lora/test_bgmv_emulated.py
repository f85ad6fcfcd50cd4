"""The BGMV kernels against the fp32 loop, without a GPU: see helpers/kernels/cuda_emulator.h.

Most cases share one shape, dtype and largest rank, so that they share compiled kernels.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from loraplex.backends.fp8 import E4M3

from helpers.kernels.bgmv_emulated import emulate_bgmv
from helpers.kernels.lora_cases import (
    POPULARITIES,
    draw_slots,
    make_batch,
    make_case,
    make_shapes,
    make_spec,
)
from helpers.kernels.lora_checks import check, check_group

ODD = make_shapes(96, 120, 40, 200)
WIDE = make_shapes(576, 192, 64, 1160)  # blocks of columns that are full, and one that is not
MAX_RANK = 40
RANKS = {
    "ones": [[{m: 1 for m in range(7)}]] * 3,
    "eights": [[{m: 8 for m in range(4)}]] * 5,
    "mixed": [[{m: r for m in range(7)}] for r in (2, 16, 17, 40)],
    "subsets": [[{1: 4}], [{0: 2, 2: 9}], [{5: 16, 6: 1}], [{m: 33 - m for m in range(7)}]],
    "none": [],
}


@pytest.fixture
def bgmv(monkeypatch: pytest.MonkeyPatch) -> Any:
    return emulate_bgmv(monkeypatch)


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [
        *((ranks, torch.float16) for ranks in RANKS if ranks != "mixed"),
        ("mixed", torch.bfloat16),
        pytest.param("mixed", torch.float16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_rank_mixes(bgmv: Any, ranks: str, dtype: torch.dtype) -> None:
    case = make_case(RANKS[ranks], ODD, dtype=dtype)
    op = bgmv(make_spec(case, 40, MAX_RANK))
    op.scratch.fill_(float("nan"))
    check(op, case, draw_slots("uniform", 21, len(RANKS[ranks])))


@pytest.mark.parametrize(
    "popularity",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name not in ("base", "half-base")))
        for name in POPULARITIES
    ],
)
def test_popularities(bgmv: Any, popularity: str) -> None:
    case = make_case([[{m: 16 for m in range(7)}]] * 9, WIDE, dtype=torch.bfloat16)
    op = bgmv(make_spec(case, 40, max_rank=16))
    op.scratch.fill_(float("nan"))
    check(op, case, draw_slots(popularity, 35, 9))


def test_every_kind_serves_every_batch(bgmv: Any) -> None:
    """Kinds differ in speed alone, but for batches that are not distinct."""
    case = make_case([[{m: r for m in range(7)}] for r in (8, 16, 24)], ODD, dtype=torch.float16)
    op = bgmv(make_spec(case, 600, MAX_RANK))
    for kind in op.graph_kinds:
        for slots in ([2], [0, 1, 2, -1], [1] * 19 + [0] * 3):
            if kind != "distinct" or len(set(slots)) == len(slots):
                plan = op.plan_graph(table=case.table, batch=make_batch(slots), kind=kind)
                check(op, case, slots, plan=plan)


def test_plans_are_independent(bgmv: Any) -> None:
    """Any number of eager plans may be alive, and one graph plan of each kind."""
    case = make_case([[{m: r for m in range(7)}] for r in (8, 17)], ODD, dtype=torch.float16)
    op = bgmv(make_spec(case, 600, MAX_RANK))
    steps = [[1, 3], [3] * 7 + [-1], [1] * 5 + [3]]
    batches = [make_batch(slots) for slots in steps]
    plans = [op.plan(table=case.table, batch=batch) for batch in batches]
    graph_plans = [
        op.plan_graph(table=case.table, batch=batch, kind=kind)
        for batch, kind in zip(batches, ("distinct", "many", "shared"), strict=True)
    ]
    for group in case.groups:
        for plan, graph_plan, slots in zip(plans, graph_plans, steps, strict=True):
            check_group(op, plan, case, slots, 0, group)
            check_group(op, graph_plan, case, slots, 0, group)
        op.plan(table=case.table, batch=batches[0])


@pytest.mark.parametrize(
    ("slots", "dtype"),
    [
        ([5, 1, 7, -1], torch.bfloat16),
        ([3] * 17 + [7, 7], torch.bfloat16),
        pytest.param([7, 1, 7, 3, 5], torch.bfloat16, marks=pytest.mark.long),
        pytest.param([5, 1, 7, -1], torch.float16, marks=pytest.mark.long),
        pytest.param([3] * 17 + [7, 7], torch.float16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_weights_in_e4m3(bgmv: Any, slots: list[int], dtype: torch.dtype) -> None:
    """200 features end in the middle of a vector and of a unit of 128."""
    shapes = make_shapes(200, 200, 40, 120)
    case = make_case(RANKS["mixed"], shapes, dtype=dtype, page_elems=128, weight_dtype=E4M3)
    del case.groups[1:]
    op = bgmv(make_spec(case, 40, MAX_RANK))
    op.scratch.fill_(float("nan"))
    check(op, case, slots)


def test_e4m3_needs_a_gpu_that_converts_it(bgmv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sgmv = pytest.importorskip("loraplex.backends.lora.sgmv.triton_sgmv").TritonSGMV
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    case = make_case([], ODD, dtype=torch.float16, weight_dtype=E4M3)
    spec = replace(make_spec(case, 40), device=torch.device("cuda", 0))
    for capability, reason in (((8, 6), "need compute capability 8.9 or later, not 8.6"),
                               ((8, 9), "None"), ((10, 0), "None")):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        for backend in (bgmv, sgmv):
            assert str(backend.probe(spec)).endswith(reason)
            assert backend.probe(replace(spec, weight_dtype=None)) is None


@pytest.mark.parametrize("num_processors", [132, pytest.param(188, marks=pytest.mark.long)])
def test_more_items_than_rows(monkeypatch: pytest.MonkeyPatch, num_processors: int) -> None:
    """Large ranks make them, on chips whose grids are larger than a graph's rows."""
    bgmv = emulate_bgmv(monkeypatch, num_processors)
    case = make_case([[{3: 256}]] * 36, ODD, dtype=torch.float16)
    case.groups[:] = [group for group in case.groups if group.modules == (3,)]
    op = bgmv(make_spec(case, 36, max_rank=256))
    op.scratch.fill_(float("nan"))
    check(op, case, [2 * row + 1 for row in range(36)])


def test_a_capacity_that_is_no_multiple_of_four(bgmv: Any) -> None:
    case = make_case([[{m: 8 for m in range(7)}]] * 2, ODD, dtype=torch.float16)
    op = bgmv(make_spec(case, 1001, MAX_RANK))
    check(op, case, [1, 3] * 8 + [-1] * 600 + [1])
