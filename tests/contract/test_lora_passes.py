"""Rows with several weighted adapters, in every backend of op ``lora``, against the fp32 loop."""

from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.passes import LoRAPasses
from loraplex.engine.worker.adapters.weighted_rows import WeightedRows

from helpers.kernels.lora_cases import LoRACase, make_batch, make_case, make_shapes, make_spec
from helpers.kernels.lora_checks import TOLERANCE, apply, as_bits, make_inputs
from helpers.kernels.oracles import lora_oracle

NAMES = [backend.name for backend in registry.list_backends("lora")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RANKS = [[{1: 4, 4: 3}, {}], [{0: 2, 2: 9}, {0: 9, 2: 2}], [{m: m + 1 for m in range(7)}] * 2]
"""Adapters in the slots 1, 3 and 5; the table has two more rows, 6 and 7."""


def _make(name: str, device: str) -> tuple[LoRACase, LoRAPasses, Any, torch.dtype]:
    dtype = torch.float32 if device == "cpu" else torch.float16
    case = make_case(RANKS, make_shapes(96, 120, 40, 200), dtype=dtype, device=device)
    backend = next(b for b in registry.list_backends("lora") if b.name == name)
    spec = make_spec(case, 64)
    if (reason := backend.probe(spec)) is not None:
        pytest.skip(f"{name}: {reason}")
    op = backend.make(spec)
    return case, LoRAPasses(op), op, dtype


def _write(rows: WeightedRows, device: str) -> None:
    rows.write(Uploader(torch.device(device)).upload(rows.take_new()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_weighted_passes(name: str, device: str) -> None:
    case, passes, _, dtype = _make(name, device)
    rows = WeightedRows(case.table, 6)
    half, minus = rows.acquire(1, 0.5), rows.acquire(5, -2.0)
    assert {half, minus} == {6, 7} and rows.acquire(3, 1.0) == 3
    _write(rows, device)
    first = [half, 1, -1, 5, half, minus, 3, 3, -1]
    second = [minus, 3, -1, 1, -1, half, half, 5, -1]
    third = [3, -1, -1, minus, -1, 3, -1, minus, -1]
    steps = [first, second, third]
    plan = passes.plan(table=case.table, batches=[make_batch(slots) for slots in steps])
    assert plan.family in ("bgmv", "sgmv", "bmm") and plan.kind == plan.plans[0].kind
    for layer in range(2):
        weights = case.of_layer(layer)
        for row, (slot, weight) in {half: (1, 0.5), minus: (5, -2.0)}.items():
            for (at, module), (a, b, scale) in case.of_layer(layer).items():
                if at == slot:
                    weights[row, module] = (a, b, scale * weight)
        for group in case.groups:
            x, buffer = make_inputs(case, group, first, len(first) + 3, seed=layer)
            got = apply(passes, plan, case, layer, group, x, buffer)
            want = buffer
            for slots in steps:
                want = lora_oracle(want, x, group, slots, weights)
            named = torch.tensor(first, device=device) >= 0
            width = sum(group.out_features)
            close = got[: len(first), :width][named].float(), want[: len(first), :width][named]
            error = (close[0] - close[1]).norm() / close[1].norm()
            assert error < TOLERANCE[dtype], f"layer {layer}, {group.modules}: {error}"
            is_base = torch.ones(len(got), dtype=torch.bool, device=device)
            is_base[: len(first)] = ~named
            assert torch.equal(as_bits(got[is_base]), as_bits(buffer[is_base]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_one_pass_equals_the_op_bit_for_bit(name: str, device: str) -> None:
    case, passes, op, _ = _make(name, device)
    slots = [1, 5, -1, 3, 5, 1]
    batch = make_batch(slots)
    plan, alone = (
        passes.plan(table=case.table, batches=[batch]),
        op.plan(table=case.table, batch=batch),
    )
    for group in case.groups:
        x, buffer = make_inputs(case, group, slots, len(slots), seed=0)
        got = apply(passes, plan, case, 1, group, x, buffer)
        want = apply(op, alone, case, 1, group, x, buffer)
        assert torch.equal(as_bits(got), as_bits(want))
