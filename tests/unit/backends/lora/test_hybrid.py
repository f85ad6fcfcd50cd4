"""The choice of `hybrid` between its two halves, for which recording fakes stand in."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraplex.backends.lora.contract import LoRABatch
from loraplex.backends.lora.hybrid import (
    SGMV_ROWS,
    SGMV_ROWS_LARGE_RANKS,
    SGMV_STEP_ROWS,
    HybridLoRA,
)

from helpers.kernels.lora_cases import make_batch, make_case, make_shapes, make_spec

F16, SMALL_RANK = torch.float16, 16


@dataclass
class Planned:
    family: str
    kind: str
    num_tokens: int
    is_graph: bool = False


class Family:
    def __init__(self, family: str, *kinds: str) -> None:
        self.name = self.family = family
        self.graph_kinds = kinds
        self.max_graph_rows = 512
        self.run: list[Planned] = []

    def kind_of(self, *, table: Any, batch: LoRABatch) -> str:
        return self.graph_kinds[0]

    def plan(self, *, table: Any, batch: LoRABatch) -> Planned:
        return Planned(self.family, self.graph_kinds[0], batch.num_tokens)

    def plan_graph(self, *, table: Any, batch: LoRABatch, kind: str) -> Planned:
        return Planned(self.family, kind, batch.num_tokens, is_graph=True)

    def shrink(self, plan: Planned, **unused: Any) -> None:
        self.run.append(plan)

    expand = shrink


@pytest.fixture
def halves() -> tuple[Family, Family]:
    return Family("bgmv", "distinct", "shared"), Family("sgmv", "sgmv")


@pytest.fixture
def op(halves: Any) -> Any:
    return HybridLoRA(make_spec(make_case([], make_shapes(64, 64, 64, 64), dtype=F16), 8), halves)


def make_table(rank: int, large: tuple[int, ...] = ()) -> Any:
    """Two layers and modules; the slots in `large` have a rank above SMALL_RANK in one of each."""
    ranks = torch.full((2, 2, 200), rank, dtype=torch.int32)
    for slot in large:
        ranks[1, 0, slot] = SMALL_RANK + 1
    return SimpleNamespace(host_rank=ranks)


@pytest.mark.parametrize(
    ("slots", "family"),
    [
        ([], "bgmv"),
        ([-1] * 40, "bgmv"),
        (range(64), "bgmv"),
        ([3] * (SGMV_STEP_ROWS - 1), "bgmv"),
        ([3] * SGMV_STEP_ROWS, "sgmv"),
        ([3] * (SGMV_STEP_ROWS - 1) + [4], "sgmv"),
        ([3] * SGMV_STEP_ROWS + [-1] * 90, "sgmv"),
        ([3] * (SGMV_STEP_ROWS - 1) + [-1] * 90, "bgmv"),
        ([*range(20)] * SGMV_ROWS, "sgmv"),
        ([*range(20)] * SGMV_ROWS + [20], "bgmv"),
        ([*range(20)] * (SGMV_ROWS - 1), "bgmv"),
    ],
)
def test_graphs_go_by_rows_an_adapter(op: Any, slots: Any, family: str) -> None:
    batch = make_batch(list(slots))
    table = make_table(SMALL_RANK, large=(150,))  # not in the batch
    kind = op.kind_of(table=table, batch=batch)
    plan = op.plan_graph(table=table, batch=batch, kind=kind)
    assert plan == Planned(family, "distinct" if family == "bgmv" else "sgmv", len(slots), True)


@pytest.mark.parametrize(
    ("num_rows", "num_adapters", "family"),
    [
        (SGMV_STEP_ROWS - 1, 1, "bgmv"),
        (SGMV_STEP_ROWS, 1, "sgmv"),
        (SGMV_ROWS * 100 - 1, 100, "bgmv"),
        (SGMV_ROWS * 100, 100, "sgmv"),
    ],
)
def test_eager_steps_do_alike(op: Any, num_rows: int, num_adapters: int, family: str) -> None:
    batch = make_batch([row % num_adapters for row in range(num_rows)])
    plan = op.plan(table=make_table(SMALL_RANK), batch=batch)
    assert plan.family == family and not plan.is_graph


@pytest.mark.parametrize(
    ("num_rows", "num_base", "num_adapters", "family"),
    [
        (512, 0, 1, "bgmv"),
        (512, 1, 1, "sgmv"),
        (513, 0, 1, "sgmv"),
        (SGMV_ROWS_LARGE_RANKS * 100, 0, 100, "sgmv"),
        (SGMV_ROWS_LARGE_RANKS * 100 - 1, 0, 100, "bgmv"),
        (SGMV_STEP_ROWS - 1, 600, 1, "bgmv"),
    ],
)
def test_a_large_rank_keeps_bgmv_in_all_but_long_steps(
    op: Any, num_rows: int, num_base: int, num_adapters: int, family: str
) -> None:
    batch = make_batch([row % num_adapters for row in range(num_rows)] + [-1] * num_base)
    table = make_table(8, large=(0,))
    assert op.kind_of(table=table, batch=batch) == ("sgmv" if family == "sgmv" else "distinct")
    assert op.plan(table=table, batch=batch).family == family


@pytest.mark.parametrize("kind", ["distinct", "shared", "sgmv"])
def test_a_kind_is_kept_for_a_capture(op: Any, kind: str) -> None:
    plan = op.plan_graph(table=None, batch=make_batch([-1] * 8), kind=kind)
    assert (plan.family, plan.kind) == ("sgmv" if kind == "sgmv" else "bgmv", kind)


def test_a_plan_runs_in_the_half_that_made_it(op: Any, halves: Any) -> None:
    table = make_table(SMALL_RANK)
    few, many = (op.plan(table=table, batch=make_batch([3] * n)) for n in (2, 200))
    for plan in (few, many, few):
        op.shrink(plan, x=None, pool=None, layer=0, group=None)
        op.expand(plan, y=None, pool=None, layer=0, group=None)
    assert [half.run for half in halves] == [[few] * 4, [many] * 2]
