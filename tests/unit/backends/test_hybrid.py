"""Which of its two kernel families `hybrid` takes. The families are stand-ins that remember."""

from typing import Any

import pytest

from loraplex.backends.lora.contract import LoRABatch
from loraplex.backends.lora.hybrid import SGMV_ROWS, SGMV_STEP_ROWS, HybridLoRA

from helpers.lora_cases import make_batch


class Family:
    def __init__(self, family: str, *kinds: str) -> None:
        self.family = family
        self.graph_kinds = kinds
        self.max_graph_rows = 512
        self.planned: list[tuple[int, str | None]] = []

    def kind_of(self, batch: LoRABatch) -> str:
        return self.graph_kinds[0]

    def plan(self, *, table: Any, batch: LoRABatch, kind: str | None = None) -> None:
        self.planned.append((batch.num_tokens, kind))


@pytest.fixture
def op() -> Any:
    op: Any = object.__new__(HybridLoRA)
    op._few, op._many = Family("bgmv", "distinct", "shared"), Family("sgmv", "sgmv")
    op._op = op._few
    return op


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
    kind = op.kind_of(batch)
    op.plan(table=None, batch=batch, kind=kind)
    assert op.family == family
    chosen = op._few if family == "bgmv" else op._many
    assert kind in chosen.graph_kinds and chosen.planned == [(len(slots), kind)]


@pytest.mark.parametrize(
    ("num_rows", "num_adapters", "family"),
    [
        (SGMV_STEP_ROWS - 1, 1, "bgmv"),
        (SGMV_STEP_ROWS, 1, "sgmv"),
        (SGMV_ROWS * 100 - 1, 100, "bgmv"),
    ],
)
def test_eager_steps_do_alike(op: Any, num_rows: int, num_adapters: int, family: str) -> None:
    batch = make_batch([row % num_adapters for row in range(num_rows)])
    op.plan(table=None, batch=batch)
    assert op.family == family


@pytest.mark.parametrize("kind", ["distinct", "shared", "sgmv"])
def test_a_kind_is_kept_for_a_capture(op: Any, kind: str) -> None:
    op.plan(table=None, batch=make_batch([-1] * 8), kind=kind)
    assert op.family == ("sgmv" if kind == "sgmv" else "bgmv")
