"""Which of its two kernel families `hybrid` takes. The families are stand-ins that remember."""

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

from helpers.kernels.lora_cases import make_batch

SMALL_RANK = 16


class Family:
    def __init__(self, family: str, *kinds: str) -> None:
        self.family = family
        self.graph_kinds = kinds
        self.max_graph_rows = 512
        self.planned: list[tuple[int, str | None]] = []

    def kind_of(self, *, table: Any, batch: LoRABatch) -> str:
        return self.graph_kinds[0]

    def plan(self, *, table: Any, batch: LoRABatch, kind: str | None = None) -> None:
        self.planned.append((batch.num_tokens, kind))


@pytest.fixture
def op() -> Any:
    op: Any = object.__new__(HybridLoRA)
    op._few, op._many = Family("bgmv", "distinct", "shared"), Family("sgmv", "sgmv")
    op._op = op._few
    op.max_graph_rows = 512
    return op


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
    op.plan(table=table, batch=batch, kind=kind)
    assert op.family == family
    chosen = op._few if family == "bgmv" else op._many
    assert kind in chosen.graph_kinds and chosen.planned == [(len(slots), kind)]


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
    op.plan(table=make_table(SMALL_RANK), batch=batch)
    assert op.family == family


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
    op.plan(table=table, batch=batch)
    assert op.family == family


@pytest.mark.parametrize("kind", ["distinct", "shared", "sgmv"])
def test_a_kind_is_kept_for_a_capture(op: Any, kind: str) -> None:
    op.plan(table=None, batch=make_batch([-1] * 8), kind=kind)
    assert op.family == ("sgmv" if kind == "sgmv" else "bgmv")
