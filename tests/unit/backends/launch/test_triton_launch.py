"""Launch passes to the driver what the PTX of every kernel declares. No GPU."""

import ctypes
import logging
import struct
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from loraplex.backends.collective.kernels import (  # noqa: E402
    gather_kernel,
    reduce_add_norm_kernel,
    reduce_kernel,
)
from loraplex.backends.fused.contract import FusedSpec  # noqa: E402
from loraplex.backends.fused.kernels.draw import (  # noqa: E402
    draw_merge_kernel,
    draw_split_kernel,
)
from loraplex.backends.fused.kernels.layer import (  # noqa: E402
    rms_norm_kernel,
    rope_store_kv_kernel,
    silu_mul_kernel,
)
from loraplex.backends.fused.triton_ops import TritonFused  # noqa: E402
from loraplex.backends.launch import cuda as cuda_launch  # noqa: E402
from loraplex.backends.launch import triton as triton_launch  # noqa: E402
from loraplex.backends.launch.cuda import Launch  # noqa: E402
from loraplex.backends.launch.triton import TritonLaunch  # noqa: E402
from loraplex.backends.lora.contract import apply_lora  # noqa: E402
from loraplex.backends.lora.sgmv.kernels import expand_kernel, shrink_kernel  # noqa: E402
from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV  # noqa: E402

from helpers.fakes.fake_cuda import FakeCuda  # noqa: E402
from helpers.kernels.lora_cases import make_batch, make_case, make_shapes, make_spec  # noqa: E402

STREAM = 77
HUGE = 1 << 33
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
E4M3 = torch.float8_e4m3fn
SGMV = {"HEADER": 16, "ORDER_AT": 64, "FIRST_MODULE": 0, "PAGE": 4096, "ALIGN": 64, "PDL": True}
SHRINK = SGMV | {"NUM_MODULES": 2, "K": 576, "BLOCK_M": 16, "BLOCK_R": 16, "num_stages": 4}
EXPAND = SGMV | {
    "NUM_MODULES": 1, "OUT_0": 576, "OUT_1": 0, "OUT_2": 0, "START_1": 0, "START_2": 0,
    "MAX_SPLITS": 8, "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_R": 16, "MAX_RANK": 64, "num_stages": 1,
    "maxnreg": 128,
}  # fmt: skip
ROPE = {"NUM_HEADS": 4, "NUM_KV_HEADS": 2, "HEAD_DIM": 64, "BLOCK_TOKENS": 16, "HEADS": 8,
        "BLOCK_D": 32, "PDL": True}  # fmt: skip
NORM = {"SIZE": 576, "BLOCK": 1024, "ADD": True, "FP8": False, "PDL": True}
RANKS = {"RANK": 1, "WORLD": 2, "MEET": True, "PDL": True}
REDUCE = RANKS | {"SIZE": 576, "BLOCK": 1024}
POOL = [BF16, I32, F32, BF16, I32, I32, I32]
# Kernel, dtypes of its tensors, scalars, which of these stay parameters, constants.
CASES: dict[str, tuple[Any, list[torch.dtype], tuple[int | float, ...], str, dict[str, Any]]] = {
    "norm": (rms_norm_kernel, [BF16] * 6, (576, 600, 1e-5), "yyy", NORM),
    "norm, strides of 1": (rms_norm_kernel, [F32] * 6, (1, 1, 1e-6), "nny", NORM),
    "norm, eps of 1": (rms_norm_kernel, [BF16] * 6, (577, 1, 1.0), "yny", NORM),
    "norm, long strides": (rms_norm_kernel, [BF16] * 6, (HUGE, HUGE + 1, 0.5), "yyy", NORM),
    "norm, e4m3": (rms_norm_kernel, [BF16] * 4 + [E4M3, F32], (576, 600, 1e-5), "yyy",
                   NORM | {"FP8": True}),
    "silu": (silu_mul_kernel, [BF16] * 2, (3072,), "y", {"SIZE": 1536, "BLOCK": 1024, "PDL": True}),
    "rope": (rope_store_kv_kernel, [BF16, F32, BF16, I64, *[BF16] * 3], (512, 0.0), "yy",
             ROPE | {"NORM": False}),
    "rope, norm": (rope_store_kv_kernel, [BF16, F32, BF16, I64, *[BF16] * 3], (1, 1e-6), "ny",
                   ROPE | {"NORM": True}),
    "draw": (draw_split_kernel, [F32, F32, I64, I32, I32, I64], (2, 32001, 1, 1024), "yyyy",
             {"VOCAB": 32001, "BLOCK": 1024, "PDL": True}),
    "merge": (draw_merge_kernel, [I64] * 2, (1,), "y", {"MAX_SPLITS": 256, "PDL": True}),
    "reduce": (reduce_kernel, [BF16, I64, I64], (1,), "y", REDUCE),
    "reduce, norm": (reduce_add_norm_kernel, [BF16] * 3 + [I64] * 3, (1, 1e-5), "yy",
                     REDUCE | {"TWO_SHOT": True}),
    "gather": (gather_kernel, [BF16, I64, I64], (16,), "y", RANKS | {"WIDTH": 64, "BLOCK": 64}),
    "shrink": (shrink_kernel, POOL, (1, 576, HUGE, 9, 7, 14, 2), "yyyyyyy", SHRINK),
    "shrink, ones": (shrink_kernel, POOL, (0, 1, 4096, 1, 1, 1, 1), "ynyyyyn", SHRINK),
    "expand": (expand_kernel, [*POOL, F32], (31, 577, 1, 9, 1, 14, 1), "yynyyyn", EXPAND),
    "expand, long pool": (expand_kernel, [*POOL, F32], (1, 1, HUGE, 1, 7, 1, 2), "ynyyyyy", EXPAND),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    if not hasattr(rms_norm_kernel, "cache_key"):
        pytest.skip("the kernels were imported under TRITON_INTERPRET")
    fake = FakeCuda()
    monkeypatch.setattr(cuda_launch, "cuda_driver", lambda: fake)
    monkeypatch.setattr(triton_launch, "current_stream", lambda device_index: STREAM)
    triton_launch._warn.cache_clear()
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    return fake


def make_tensors(dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    return [torch.zeros(64, dtype=dtype) for dtype in dtypes]


def single(value: int | float) -> int | float:
    """Returns the value as a kernel's parameter holds it."""
    return struct.unpack("f", struct.pack("f", value))[0] if isinstance(value, float) else value


@pytest.mark.parametrize("case", CASES)
def test_arguments_are_the_parameters_of_the_ptx(cuda: FakeCuda, case: str) -> None:
    kernel, dtypes, scalars, stays, constants = CASES[case]
    launch = TritonLaunch(kernel, scalars, num_warps=2, launch_pdl=True, **constants)
    for num_blocks in (5, 70000):
        tensors = make_tensors(dtypes)
        launch(num_blocks, *tensors)
        seen = cuda.launches.pop()
        assert (seen.name, seen.grid) == (kernel.fn.__name__, (num_blocks, 1, 1))
        assert (seen.threads, seen.stream, seen.is_pdl) == ((64, 1, 1), STREAM, True)
        kept = [single(s) for s, stay in zip(scalars, stays, strict=True) if stay == "y"]
        assert seen.arguments == [*(t.data_ptr() for t in tensors), *kept, 0, 0]
    # Triton finds it in its cache: the binary is the one that its own launch takes.
    compiled = kernel.warmup(
        *tensors, *scalars, grid=(1,), num_warps=2, launch_pdl=True, **constants
    )
    assert compiled is launch._compiled and seen.shared_bytes == compiled.metadata.shared
    if kernel is shrink_kernel:
        assert seen.shared_bytes > 0
    assert not cuda.ordinary


def test_only_aligned_tensors_and_work_go_to_the_driver(cuda: FakeCuda) -> None:
    launch = TritonLaunch(silu_mul_kernel, (128,), SIZE=64, BLOCK=1024, PDL=False)
    x, y = make_tensors([BF16, BF16])
    odd = torch.zeros(65, dtype=BF16)[1:]
    assert odd.data_ptr() % 16
    launch(1, odd, y)
    launch(1, x, y)
    launch(1, x, odd)
    launch(0, x, y)
    assert len(cuda.ordinary) == 2 and len(cuda.launches) == 1
    assert not cuda.launches[0].is_pdl and cuda.launches[0].arguments[:2] == [
        x.data_ptr(), y.data_ptr(),
    ]  # fmt: skip


def test_the_first_scalar_may_change_from_call_to_call(cuda: FakeCuda) -> None:
    out, addresses, flags = make_tensors([BF16, I64, I64])
    odd = torch.zeros(65, dtype=BF16)[1:]
    launch = TritonLaunch(reduce_kernel, (0,), **REDUCE)
    for tensor, num_rows in ((out, 1), (out, 16), (odd, 5), (out, 7)):
        launch(3, tensor, addresses, flags, first_scalar=num_rows)
    launch(3, out, addresses, flags)
    assert [one.arguments[3] for one in cuda.launches] == [1, 16, 7, 7]
    (seen,) = cuda.ordinary
    assert 5 in [value for value in seen if isinstance(value, int)]


def test_kept_tensors_follow_those_of_each_call(cuda: FakeCuda) -> None:
    x, y, weight = make_tensors([BF16] * 3)
    odd = torch.zeros(65, dtype=BF16)[1:]
    for kept in (weight, odd):
        launch = TritonLaunch(
            rms_norm_kernel, (64, 64, 0.5), (kept, y, y, y), **NORM | {"SIZE": 64}
        )
        for first in (x, y, x):
            launch(1, first, y)
    tensors = [[first, y, weight, y, y, y] for first in (x, y, x)]
    assert [one.arguments[:6] for one in cuda.launches] == [
        [tensor.data_ptr() for tensor in all_six] for all_six in tensors
    ]
    assert len(cuda.ordinary) == 3, "a kept tensor that does not start at 16 bytes"


@pytest.mark.parametrize("cause", ["layout", "driver"])
def test_what_does_not_add_up_goes_through_triton(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    if cause == "layout":
        cuda.hidden = 1
    else:
        del cuda.cuFuncGetParamInfo
    x, y = make_tensors([BF16, BF16])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            launch = TritonLaunch(silu_mul_kernel, (128,), SIZE=64, BLOCK=1024, PDL=False)
            launch(1, x, y)
            launch(2, x, y)
    assert len(cuda.ordinary) == 4 and not cuda.launches
    (message,) = [record.getMessage() for record in caplog.records]
    assert "silu_mul_kernel" in message
    assert ("(24, 8)" if cause == "layout" else "CUDA 12.4") in message


def test_a_refused_launch_raises(cuda: FakeCuda) -> None:
    cuda.status = 719
    launch = TritonLaunch(silu_mul_kernel, (128,), SIZE=64, BLOCK=1024, PDL=False)
    with pytest.raises(RuntimeError, match="719"):
        launch(1, *make_tensors([BF16, BF16]))


def test_integers_and_the_rest_follow_the_pointers(cuda: FakeCuda) -> None:
    cuda.functions[5] = ("raw", ["u64", "u64", "u32", "u32", "f32"])
    launch = Launch(5, num_threads=96, pdl=True, pointers=(1, 2), integers=(3, 4),
                    rest=(ctypes.c_float(0.5),), shared_bytes=70000)  # fmt: skip
    launch.pointers[1], launch.integers[0] = 1 << 47, -6
    launch.enqueue(9, STREAM)
    (seen,) = cuda.launches
    assert seen.arguments == [1, 1 << 47, -6, 4, 0.5]
    assert (seen.threads, seen.shared_bytes) == ((96, 1, 1), 70000)


def test_fused_operators_launch_by_strides(cuda: FakeCuda) -> None:
    op = TritonFused(FusedSpec(dtype=BF16, device=torch.device("cpu"), head_dim=64))
    wide, weight = torch.zeros(6, 600, dtype=BF16), torch.zeros(576, dtype=BF16)
    for x in (wide[:, :576], wide[:, 8:584], wide[:5, :576].contiguous(), wide[:, :576]):
        y = op.rms_norm(x, weight, 1e-5)
        seen = cuda.launches[-1]
        assert seen.grid[0] == len(x)
        assert seen.arguments[:8] == [
            x.data_ptr(), x.data_ptr(), weight.data_ptr(), *[y.data_ptr()] * 3,
            x.stride(0), x.stride(0),
        ]  # fmt: skip
    assert len(op._launches) == 2 and len(cuda.launches) == 4
    x, residual = wide[:, :576], torch.zeros(6, 576, dtype=BF16)
    op.add_rms_norm(x, residual, weight, 1e-5)
    seen = cuda.launches[-1]
    assert seen.arguments[:2] == [x.data_ptr(), residual.data_ptr()]
    assert seen.arguments[6:8] == [600, 576]


def test_draws_launch_with_and_without_masks(cuda: FakeCuda) -> None:
    op = TritonFused(FusedSpec(dtype=BF16, device=torch.device("cpu"), head_dim=64))
    logits, heat = torch.zeros(3, 5000, dtype=BF16), torch.zeros(3)
    keys, places = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    for num_masks in (0, 1, 2, 0):
        masks = torch.zeros(num_masks, 157, dtype=torch.int32)
        given = {"mask_places": places, "masks": masks} if num_masks else {}
        sampled = op.draw(logits, heat, keys, **given)
        split, merge = cuda.launches[-2:]
        fixed = [logits.data_ptr(), heat.data_ptr(), keys.data_ptr()]
        pointers = [places.data_ptr(), masks.data_ptr()] if num_masks else [sampled.data_ptr()] * 2
        assert split.arguments[:6] == [*fixed, *pointers, merge.arguments[0]]
        assert split.arguments[6:8] == [num_masks, 5000]
        assert merge.arguments[1] == sampled.data_ptr()
    assert not cuda.ordinary and len(cuda.launches) == 8


def test_sgmv_launches_by_layer_and_table(cuda: FakeCuda) -> None:
    shapes = make_shapes(96, 120, 40, 200)
    cases = [
        make_case([[{m: 8 for m in range(7)}] * 2] * count, shapes, dtype=torch.float16)
        for count in (2, 3)
    ]
    op = TritonSGMV(make_spec(cases[0], 64))
    group = cases[0].groups[0]
    for case in (*cases, cases[0]):
        table = case.table
        plan = op.plan(table=table, batch=make_batch([1, 3, 1]))
        for layer in (0, 1):
            x = torch.zeros(3, group.in_features, dtype=torch.float16)
            y = torch.zeros(3, sum(group.out_features), dtype=torch.float16)
            apply_lora(op, plan, y=y, x=x, pool=case.pool, layer=layer, group=group)
            strides = [
                case.pool.stride(0), table.page_table.stride(0),
                *(table.rank.stride(i) for i in (0, 2)), table.rank.stride(1),
            ]  # fmt: skip
            if strides[-1] == 1:
                strides.pop()
            shrink, expand = cuda.launches[-2:]
            common = [plan.meta, op.scratch, case.pool, table.page_table, table.rank]
            for seen, first, last in (
                (shrink, x, [table.a_start]), (expand, y, [table.b_start, table.scale]),
            ):  # fmt: skip
                pointers = [t.data_ptr() for t in (first, *common, *last)]
                scalars = [layer, first.stride(0), *strides]
                assert seen.arguments == [*pointers, *scalars, 0, 0]
    assert not cuda.ordinary and len(cuda.launches) == 12
