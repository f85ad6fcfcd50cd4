"""Launches through the driver give the bits of Triton's own, in graphs too, for less CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.kernels.layer import silu_mul_kernel
from loraplex.backends.fused.triton_ops import TritonFused
from loraplex.backends.launch import triton
from loraplex.backends.launch.triton import TritonLaunch, UnknownLayout
from loraplex.backends.lora.contract import apply_lora
from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV

from helpers.kernels.lora_cases import (
    LoRACase,
    draw_slots,
    make_batch,
    make_case,
    make_shapes,
    make_spec,
)
from helpers.running.calls import count_calls

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
RANKS = [[{m: r for m in range(7)}] * 3 for r in (1, 8, 16, 17, 64)]
Call = Callable[[], list[torch.Tensor]]


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns a function after whose call all new launches go through Triton's own launch."""

    def refuse(*_: Any) -> None:
        raise UnknownLayout("the test wants Triton's own launch")

    return lambda: monkeypatch.setattr(triton, "lay_out", refuse)


def assert_prepared(launches: dict[Any, TritonLaunch], expected: bool) -> None:
    assert launches and all((one._launch is not None) == expected for one in launches.values())


def replay(call: Call) -> list[torch.Tensor]:
    """Returns the results of a captured call after its third replay."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return results


def fused_call(op: TritonFused, rows: int, size: int, dtype: torch.dtype) -> Call:
    """Returns a call of all operators on rows whose stride is not their size, inputs unchanged."""
    head_dim, heads, kv_heads = 64, 9, 3
    x = random(rows, size + 64, dtype=dtype, seed=1)[:, :size]
    residual, weight = random(rows, size, dtype=dtype, seed=2), random(size, dtype=dtype, seed=3)
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=4)
    cos_sin = random(rows, head_dim, dtype=torch.float32, seed=5)
    norm = random(head_dim, dtype=dtype, seed=6)
    kv_rows = torch.arange(rows, device="cuda") // 16 * 32 + torch.arange(rows, device="cuda") % 16
    logits = random(min(rows, 7), 1000, dtype=dtype, seed=7)
    temperature = torch.ones(len(logits), device="cuda")
    keys = torch.arange(2 * len(logits), device="cuda").view(-1, 2)

    def call() -> list[torch.Tensor]:
        added = residual.clone()
        kv = torch.zeros(rows // 16 + 1, 2, 16, kv_heads, head_dim, dtype=dtype, device="cuda")
        common: dict[str, Any] = {"qkv": qkv, "cos_sin": cos_sin, "kv": kv, "kv_rows": kv_rows}
        q, normed = torch.empty(2, rows, heads, head_dim, dtype=dtype, device="cuda")
        op.rope_store_kv(**common, out=q)
        kv_before = kv.clone()
        op.rope_store_kv(**common, out=normed, q_norm=norm, k_norm=norm, eps=1e-6)
        return [
            op.rms_norm(x, weight, 1e-5),
            op.add_rms_norm(x, added, weight, 1e-6),
            added,
            q,
            kv_before,
            normed,
            kv,
            op.silu_mul(x),
            op.draw(logits, temperature, keys),
        ]

    return call


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (33, 4096), (700, 1536), (5, 78)])
def test_fused_gives_the_same_bits(
    rows: int, size: int, dtype: torch.dtype, ordinary: Callable[[], None]
) -> None:
    spec = FusedSpec(dtype=dtype, device=torch.device("cuda"), head_dim=64)
    op = TritonFused(spec)
    call = fused_call(op, rows, size, dtype)
    got, captured = call(), replay(call)
    assert_prepared(op._launches, True)
    ordinary()
    judge = TritonFused(spec)
    want = fused_call(judge, rows, size, dtype)()
    assert_prepared(judge._launches, False)
    for first, second, expected in zip(got, captured, want, strict=True):
        assert torch.equal(first, expected) and torch.equal(second, expected)


def sgmv_call(op: TritonSGMV, case: LoRACase, num_rows: int) -> Call:
    slots = draw_slots("uniform", num_rows, case.num_adapters, num_rows)
    plan = op.plan(table=case.table, batch=make_batch(sorted(slots)))
    inputs = [random(num_rows, g.in_features, dtype=case.pool.dtype, seed=1) for g in case.groups]
    bases = [
        random(num_rows, sum(g.out_features) + 8, dtype=case.pool.dtype, seed=2)
        for g in case.groups
    ]

    def call() -> list[torch.Tensor]:
        results = []
        for layer in range(3):
            for group, x, base in zip(case.groups, inputs, bases, strict=True):
                y = base.clone()[:, :-8]
                apply_lora(op, plan, y=y, x=x, pool=case.pool, layer=layer, group=group)
                results.append(y)
        return results

    return call


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [1, 33, 512, 1500])
def test_sgmv_gives_the_same_bits(
    num_rows: int, dtype: torch.dtype, ordinary: Callable[[], None]
) -> None:
    case = make_case(RANKS, make_shapes(576, 576, 192, 1536), dtype=dtype, device="cuda",
                     page_elems=8192)  # fmt: skip
    op = TritonSGMV(make_spec(case, 2048, 64))
    call = sgmv_call(op, case, num_rows)
    got, captured = call(), replay(call)
    for launches in (op._launches._shrinks, op._launches._expands):
        assert len(launches) == 3 * len(case.groups)
        assert_prepared(launches, True)
    ordinary()
    judge = TritonSGMV(make_spec(case, 2048, 64))
    want = sgmv_call(judge, case, num_rows)()
    assert_prepared(judge._launches._shrinks, False)
    for first, second, expected in zip(got, captured, want, strict=True):
        assert not expected.isnan().any()
        assert torch.equal(first, expected) and torch.equal(second, expected)


def test_a_graph_keeps_the_arguments_of_its_capture() -> None:
    launch = TritonLaunch(silu_mul_kernel, (128,), SIZE=64, BLOCK=1024, PDL=False, num_warps=4)
    x, y = random(4, 128), torch.zeros(4, 64, dtype=BF16, device="cuda")
    other = torch.zeros_like(y)
    launch(4, x, y)
    torch.cuda.synchronize()
    want = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(4, x, y)
    launch(4, random(4, 128, seed=9), other)
    y.zero_()
    before = other.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want) and torch.equal(other, before)


def test_tensors_that_are_not_aligned() -> None:
    """One object launches aligned and unaligned tensors, in any order."""
    launch = TritonLaunch(silu_mul_kernel, (136,), SIZE=64, BLOCK=1024, PDL=False, num_warps=4)
    wide = random(33, 136)
    for start in (1, 0, 3, 8, 0):
        x, y = wide[:, start : start + 128], torch.zeros(33, 64, dtype=BF16, device="cuda")
        assert (x.data_ptr() % 16 == 0) == (start % 8 == 0)
        want = torch.zeros_like(y)
        launch(33, x, y)
        silu_mul_kernel[(33,)](x, want, 136, SIZE=64, BLOCK=1024, PDL=False, num_warps=4)
        assert torch.equal(y, want) and want.count_nonzero() > 0
    assert launch._launch is not None


def test_a_launch_goes_to_the_current_stream() -> None:
    launch = TritonLaunch(silu_mul_kernel, (128,), SIZE=64, BLOCK=1024, PDL=False, num_warps=4)
    x, side = random(4, 128), torch.cuda.Stream()
    y = torch.zeros(4, 64, dtype=BF16, device="cuda")
    launch(4, x, y)
    want = y.clone()
    y.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        launch(4, x, y)
    early = y.clone()  # of the main stream, which does not wait
    torch.cuda.current_stream().synchronize()
    assert not early.any()
    side.synchronize()
    assert torch.equal(y, want)


def test_a_launch_makes_fewer_calls_than_tritons_own(ordinary: Callable[[], None]) -> None:
    x, y = random(4, 128), torch.zeros(4, 64, dtype=BF16, device="cuda")

    def num_calls() -> int:
        launch = TritonLaunch(silu_mul_kernel, (128,), SIZE=64, BLOCK=1024, PDL=False, num_warps=4)
        launch(4, x, y)  # compiles
        return count_calls(lambda: launch(4, x, y))[1]

    prepared = num_calls()
    ordinary()
    assert prepared < num_calls()
