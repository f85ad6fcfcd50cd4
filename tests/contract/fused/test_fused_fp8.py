"""Every backend of op ``fused`` where it writes e4m3: rows with scales, and pages."""

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.fp8 import E4M3, Fp8Rows, empty_rows

from helpers.kernels.fp8_oracle import is_judged, quantize_oracle, round_e4m3
from helpers.kernels.fused_cases import make_fused

NAMES = [backend.name for backend in registry.list_backends("fused")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


def make_op(name: str, dtype: torch.dtype, device: str) -> Any:
    op, reason = make_fused(name, dtype, device)
    if reason is not None:
        pytest.skip(reason)
    return op


def make_rows(rows: int, width: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """Returns random rows [rows, width] that lie further apart than their width."""
    values = torch.randn(rows, width + 32, generator=torch.Generator().manual_seed(seed)) * 2
    return values.to(dtype).to(device)[:, :width]


def check_fp8(fp8: Fp8Rows, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Compares with rounded rows, but for a few values that lie between two numbers of e4m3."""
    scales = want.float().abs().amax(dim=1, keepdim=True) / 448
    torch.testing.assert_close(fp8.scales.cpu(), scales.clamp_min(1e-12), rtol=1e-6, atol=0)
    rounded = quantize_oracle(want)
    judged = is_judged((want.float() / scales.clamp_min(1e-12)).numpy())
    error = (fp8.dequantize().cpu().double() - rounded).abs() * torch.from_numpy(judged)
    assert (error > 1e-5 * want.double().abs()).double().mean() < 1e-2
    step = want.double().abs() / 8 + scales.double() * 2.0**-9
    assert (error <= step).all()


def sum_error(dtype: torch.dtype, device: str) -> float:
    """Returns how far two kernels may differ that compute the same: another one may add up in
    another order, which 16 bits do not show."""
    return 1e-6 if dtype is torch.float32 and device == "cuda" else 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (3, 576), (40, 1000), (2, 18944), (5, 80)])
@pytest.mark.parametrize("name", NAMES)
def test_results_in_e4m3(name: str, rows: int, size: int, dtype: torch.dtype, device: str) -> None:
    """Operators write what `quantize_rows` gives for their result, and leave the result alone."""
    op = make_op(name, dtype, device)
    x = make_rows(rows, size, dtype, device, 1)
    x[0] = 0
    check_fp8(op.quantize_rows(x), x.cpu(), dtype)
    residual = make_rows(rows, size, dtype, device, 2)
    weight = torch.rand(size, device=device).to(dtype) + 0.5
    gate_up = make_rows(rows, 2 * size, dtype, device, 4)
    calls = (
        lambda fp8: op.rms_norm(x, weight, EPS, fp8),
        lambda fp8: op.add_rms_norm(x, residual.clone(), weight, EPS, fp8),
        lambda fp8: op.silu_mul(gate_up, fp8),
    )
    for call in calls:
        fp8 = empty_rows(rows, size, torch.device(device))
        y = call(fp8)
        rtol = sum_error(dtype, device)
        torch.testing.assert_close(y, call(None), rtol=rtol, atol=rtol)
        check_fp8(fp8, y.cpu(), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_pages_in_e4m3(name: str, has_norm: bool, dtype: torch.dtype, device: str) -> None:
    """K and V are rounded to qkv's dtype, then to e4m3. What is too large becomes 448."""
    op, shape = make_op(name, dtype, device), (4, 2, 16, 2, 64)
    qkv = make_rows(5, 8 * 64, dtype, device, 5)
    qkv *= 20
    qkv[0, -3:] = torch.tensor([1000.0, -1000, 440], dtype=dtype)
    cos_sin = torch.rand(5, 64, device=device)
    norms = {"q_norm": torch.rand(64, device=device).to(dtype),
             "k_norm": torch.rand(64, device=device).to(dtype) + 1}  # fmt: skip
    kv_rows = torch.tensor([32, 33, 70, 5, 64], device=device)
    plain = torch.zeros(shape, dtype=dtype, device=device)
    rounded = torch.zeros(shape, dtype=E4M3, device=device)
    queries = []
    for kv in (plain, rounded):
        q = torch.empty(5, 4, 64, dtype=dtype, device=device)
        op.rope_store_kv(qkv=qkv, cos_sin=cos_sin, kv=kv, kv_rows=kv_rows, out=q, eps=EPS,
                         **(norms if has_norm else {}))  # fmt: skip
        queries.append(q)
    rtol = sum_error(dtype, device)
    torch.testing.assert_close(*queries, rtol=rtol, atol=rtol)
    exact = plain.float().cpu().numpy()
    want, judged = round_e4m3(exact), is_judged(exact)
    is_right = (rounded.double().cpu().numpy() == want)[judged]
    assert is_right.mean() > 0.99 if rtol else is_right.all()
    assert np.abs(want).max() == 448
