"""Gains and shifts of adapters behind op ``lora``, against a loop in fp32."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.backends.lora.contract import GraphKindError, LoRASpec, apply_lora
from loraplex.backends.lora.torch_bmm import TorchLoRA
from loraplex.backends.lora.vectors.op import SUFFIX, VectorLoRA, make_vector_lora
from loraplex.backends.lora.vectors.torch_vectors import TorchVectors

from helpers.kernels.lora_cases import (
    LoRACase,
    draw_slots,
    make_batch,
    make_case,
    make_shapes,
    make_spec,
)
from helpers.kernels.lora_checks import TOLERANCE, as_bits, make_inputs
from helpers.kernels.oracles import lora_oracle
from helpers.kernels.triton_interpreter import run_in_interpreter

KINDS = [("gain",), (), ("gain", "shift"), ("shift",)]
ALL = [{m: 3 for m in range(7)}] * 2
ADAPTERS = [ALL, ALL, [{0: 2, 2: 9, 4: 1}, {1: 4, 3: 5, 6: 2}], [{5: 1}, {}]]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def make_op(kernels: str, spec: LoRASpec) -> VectorLoRA:
    if kernels == "torch":
        return VectorLoRA(TorchLoRA(spec), TorchVectors())
    if not INTERPRETED and spec.device.type != "cuda":
        pytest.skip("it needs a CUDA device, or Triton's interpreter")
    from loraplex.backends.lora.vectors.triton_vectors import TritonVectors

    return VectorLoRA(TorchLoRA(spec), TritonVectors(spec))


def make(dtype: torch.dtype, device: str, page_elems: int = 512, hidden: int = 96) -> LoRACase:
    shapes = make_shapes(hidden, 120, 40, 1100)
    return make_case(
        ADAPTERS, shapes, dtype=dtype, device=device, page_elems=page_elems, vectors=KINDS
    )


def check(op: VectorLoRA, case: LoRACase, slots: list[int], plan: Any = None) -> None:
    plan = plan or op.plan(table=case.table, batch=make_batch(slots))
    lora = TorchLoRA(make_spec(case, 640))
    lora_plan = lora.plan(table=case.table, batch=make_batch(slots))
    of_row = torch.tensor(slots)
    for layer in range(case.pool.shape[0]):
        for group in case.groups:
            x, buffer = make_inputs(case, group, slots, len(slots) + 2, seed=layer)
            y, plain = buffer.clone(), buffer.clone()
            apply_lora(op, plan, y=y[:-2, :-8], x=x, pool=case.pool, layer=layer, group=group)
            apply_lora(
                lora, lora_plan, y=plain[:-2, :-8], x=x, pool=case.pool, layer=layer, group=group
            )
            want = lora_oracle(buffer, x, group, slots, case.of_layer(layer))
            changed = torch.zeros_like(as_bits(y), dtype=torch.bool)
            columns = zip(group.modules, group.out_starts, group.out_features, strict=True)
            for module, start, width in columns:
                for slot in set(slots):
                    gain, shift = case.vectors.get((layer, slot, module), (None, None))
                    if gain is not None:
                        rows = (of_row == slot).nonzero().flatten().to(y.device)
                        part = want[rows, start : start + width]
                        want[rows, start : start + width] = gain * part + shift
                        changed[rows, start : start + width] = True
            assert torch.equal(as_bits(y)[~changed], as_bits(plain)[~changed]), "strays"
            if changed.any():
                error = (y.float() - want)[changed].norm() / want[changed].norm()
                assert error < TOLERANCE[case.pool.dtype], (layer, group.modules)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gains_and_shifts(kernels: str, dtype: torch.dtype, device: str) -> None:
    case = make(dtype, device)
    op = make_op(kernels, make_spec(case, 640))
    for seed, popularity in enumerate(("uniform", "half-base", "identical", "distinct")):
        check(op, case, draw_slots(popularity, 9 + seed, case.num_adapters, seed))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("page_elems", [64, 6144])
def test_pages_of_any_size(kernels: str, page_elems: int) -> None:
    case = make(torch.float16, "cpu", page_elems)
    check(make_op(kernels, make_spec(case, 64)), case, [1, 3, 5, 7, -1, 1])


def test_batches_without_vectors_run_the_wrapped_backend() -> None:
    case = make(torch.float32, "cpu")
    op = make_vector_lora(TorchLoRA(make_spec(case, 64)), make_spec(case, 64))
    plain, mixed = make_batch([3, -1, 3]), make_batch([3, 1])
    wrapped = TorchLoRA(make_spec(case, 64))
    assert type(op.plan(table=case.table, batch=plain)) is type(
        wrapped.plan(table=case.table, batch=plain)
    )
    kind = wrapped.kind_of(table=case.table, batch=plain)
    assert op.kind_of(table=case.table, batch=plain) == kind
    assert op.kind_of(table=case.table, batch=mixed) == kind + SUFFIX
    assert op.plan(table=case.table, batch=mixed).kind == kind + SUFFIX
    with pytest.raises(GraphKindError, match="no graphs of kind"):
        op.plan_graph(table=case.table, batch=plain, kind="absent")


@pytest.mark.gpu
def test_graphs_replay_any_batch() -> None:
    from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV
    from loraplex.backends.lora.vectors.triton_vectors import TritonVectors

    case = make(torch.float16, "cuda", page_elems=4096)
    spec = make_spec(case, 640)
    op, num_rows, group = VectorLoRA(TritonSGMV(spec), TritonVectors(spec)), 16, case.groups[0]
    x, buffer = make_inputs(case, group, [1] * num_rows, num_rows, seed=0)
    kind = op.kind_of(table=case.table, batch=make_batch([1]))
    plan = op.plan_graph(table=case.table, batch=make_batch([-1] * num_rows), kind=kind)

    def run() -> None:
        apply_lora(op, plan, y=buffer[:-2, :-8], x=x, pool=case.pool, layer=0, group=group)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(4):
        slots = [*draw_slots("half-base", 11, case.num_adapters, seed), 1]
        inputs = make_inputs(case, group, slots, num_rows, seed=seed)
        x.copy_(inputs[0])
        buffer.copy_(inputs[1])
        op.plan_graph(table=case.table, batch=make_batch(slots), kind=kind)
        graph.replay()
        want = inputs[1].clone()
        eager = op.plan(table=case.table, batch=make_batch(slots))
        apply_lora(op, eager, y=want[:-2, :-8], x=x, pool=case.pool, layer=0, group=group)
        assert torch.equal(as_bits(buffer), as_bits(want))


@pytest.mark.long
@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter")
def test_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_interpreter(Path(__file__), wanted="gains or pages")
