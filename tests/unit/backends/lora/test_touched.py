"""Groups without work are not launched, and the sums stay those of the fp32 loop."""

from typing import Any

import pytest
import torch

from loraplex.backends.lora.contract import GraphKindError, LoRAGroup, apply_lora
from loraplex.backends.lora.torch_bmm import TorchLoRA
from loraplex.backends.lora.touched import ATTENTION, TouchedGroups

from helpers.fakes.fake_graphs import GraphedLoRA
from helpers.kernels.lora_cases import LoRACase, make_batch, make_case, make_shapes, make_spec
from helpers.kernels.lora_checks import check, make_inputs

Q_ONLY, Q_AND_O, DOWN_LATER, ALL, NONE = 1, 3, 5, 7, 9
ADAPTERS = [
    [{0: 4}, {0: 4}],
    [{0: 2, 3: 3}, {1: 1}],
    [{2: 2}, {6: 5}],
    [{m: m + 1 for m in range(7)}] * 2,
    [{}, {}],
]


class Launched(GraphedLoRA):
    """Notes the first module of each group that is expanded, once shrunk."""

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.shrunk: list[int] = []
        self.expanded: list[int] = []

    def shrink(self, plan: Any, *, group: LoRAGroup, **rest: Any) -> None:
        self.shrunk.append(group.modules[0])
        super().shrink(plan, group=group, **rest)

    def expand(self, plan: Any, *, group: LoRAGroup, **rest: Any) -> None:
        self.expanded.append(group.modules[0])
        super().expand(plan, group=group, **rest)


@pytest.fixture(scope="module")
def case() -> LoRACase:
    return make_case(ADAPTERS, make_shapes(96, 120, 40, 200), dtype=torch.float32)


@pytest.fixture
def inner(case: LoRACase) -> Launched:
    return Launched(make_spec(case, 64))


@pytest.fixture
def op(case: LoRACase, inner: Launched) -> Any:
    return TouchedGroups(inner, groups=tuple(case.groups), attention=tuple(case.groups[:2]))


def run(op: Any, plan: Any, case: LoRACase, slots: list[int]) -> None:
    for group in case.groups:
        x, buffer = make_inputs(case, group, slots, len(slots), seed=1)
        apply_lora(op, plan, y=buffer, x=x, pool=case.pool, layer=0, group=group)


@pytest.mark.parametrize(
    ("slots", "groups"),
    [
        ([Q_ONLY, -1, Q_ONLY], [0]),
        ([NONE, NONE], []),
        ([Q_AND_O, Q_ONLY], [0, 3]),
        ([DOWN_LATER], [0, 6]),  # a group counts if any layer touches it
        ([Q_ONLY, ALL, -1], [0, 3, 4, 6]),
    ],
)
def test_an_eager_step_launches_touched_groups_alone(
    op: Any, inner: Launched, case: LoRACase, slots: list[int], groups: list[int]
) -> None:
    run(op, op.plan(table=case.table, batch=make_batch(slots)), case, slots)
    assert inner.shrunk == inner.expanded == groups


@pytest.mark.parametrize(
    "slots", [[Q_ONLY] * 3, [Q_AND_O, -1, DOWN_LATER], [ALL, NONE, Q_ONLY], [NONE, -1], [-1, -1]]
)
def test_the_sums_are_those_of_the_loop(case: LoRACase, slots: list[int]) -> None:
    op = TouchedGroups(
        TorchLoRA(make_spec(case, 64)), groups=tuple(case.groups), attention=tuple(case.groups[:2])
    )
    check(op, case, slots)


@pytest.mark.parametrize(
    ("slots", "kind", "groups"),
    [
        ([Q_ONLY, Q_ONLY], "one of attention", [0, 3]),
        ([Q_ONLY, Q_AND_O], "several of attention", [0, 3]),
        ([NONE], "one of attention", [0, 3]),
        ([DOWN_LATER], "one", [0, 3, 4, 6]),
        ([Q_ONLY, -1, ALL], "several", [0, 3, 4, 6]),
    ],
)
def test_a_graph_launches_what_its_kind_says(
    op: Any, inner: Launched, case: LoRACase, slots: list[int], kind: str, groups: list[int]
) -> None:
    batch = make_batch(slots)
    assert op.kind_of(table=case.table, batch=batch) == kind
    captured = op.plan_graph(table=case.table, batch=make_batch([-1] * len(slots)), kind=kind)
    run(op, captured, case, slots)
    assert inner.shrunk == inner.expanded == groups

    plan = op.plan_graph(table=case.table, batch=batch, kind=kind)
    assert (plan.kind, plan.family) == (kind, captured.family)
    for group in case.groups:  # the captured plan refers to buffers that the later plan fills
        x, replayed = make_inputs(case, group, slots, len(slots), seed=2)
        eager = replayed.clone()
        apply_lora(op, captured, y=replayed, x=x, pool=case.pool, layer=0, group=group)
        bare = TorchLoRA(make_spec(case, 64))
        bare_plan = bare.plan(table=case.table, batch=batch)
        apply_lora(bare, bare_plan, y=eager, x=x, pool=case.pool, layer=0, group=group)
        assert torch.equal(replayed.nan_to_num(), eager.nan_to_num())


def test_an_op_without_graphs_has_none(case: LoRACase) -> None:
    op = TouchedGroups(
        TorchLoRA(make_spec(case, 64)), groups=tuple(case.groups), attention=tuple(case.groups[:2])
    )
    assert op.graph_kinds == ()
    with pytest.raises(GraphKindError, match="no graphs of kind"):
        op.plan_graph(table=case.table, batch=make_batch([Q_ONLY]), kind=ATTENTION)
