"""Every backend of op ``linear`` against float64 products of weights rounded by hand."""

from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.fp8 import empty_rows, quantize
from loraplex.backends.linear.contract import FP8, PLAIN, LinearInput, LinearSpec

from helpers.kernels.fp8_oracle import quantize_oracle

NAMES = [backend.name for backend in registry.list_backends("linear")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SIZES = [(96, 64), (4096, 512), (48, 14336)]


def make_op(name: str, form: str, dtype: torch.dtype, device: str) -> Any:
    spec = LinearSpec(dtype, torch.device(device), form, tuple(SIZES))
    backend = next(b for b in registry.list_backends("linear") if b.name == name)
    if reason := backend.probe(spec):
        pytest.skip(f"{name}: {reason}")
    return backend.make(spec)


def make_input(op: Any, x: torch.Tensor) -> LinearInput:
    if not op.takes_fp8:
        return LinearInput(x)
    fp8 = empty_rows(*x.shape, x.device)
    quantize(x, fp8)
    return LinearInput(x, fp8)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", [PLAIN, FP8])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products(
    name: str, size: tuple[int, int], form: str, dtype: torch.dtype, device: str
) -> None:
    op = make_op(name, form, dtype, device)
    outs, ins = size
    weight = op.make_weight(outs, ins)
    halves = random(outs, ins, seed=1, dtype=dtype) * ins**-0.5
    halves[0] *= 10  # each output channel has a scale of its own
    cut = outs // 3
    weight.write(slice(0, cut), lambda target: target.copy_(halves[:cut]))
    weight.write(slice(cut, outs), lambda target: target.copy_(halves[cut:]))
    exact = quantize_oracle(halves) if form == FP8 else halves.double()
    values = weight.values(slice(None))
    assert values.dtype is dtype and weight.shape == size
    torch.testing.assert_close(values.cpu().double(), exact, rtol=TOLERANCE[dtype], atol=1e-7)
    torch.testing.assert_close(weight.values(slice(cut, outs)), values[cut:], rtol=0, atol=0)
    bias = random(outs, seed=3, dtype=dtype)
    for num_tokens in (1, 3, 70):
        x = random(num_tokens, ins, seed=100 + num_tokens, dtype=dtype)  # unlike the weights
        x[-1] *= 10
        rounded = quantize_oracle(x) if form == FP8 else x.double()
        want = rounded @ exact.t()
        typical = 4 * rounded.abs() @ exact.abs().t() / ins**0.5 + 1
        given = make_input(op, x.to(device))
        out = torch.full((num_tokens, outs), float("nan"), dtype=dtype, device=device)
        for got, wanted in (
            (weight.multiply(given, None), want),
            (weight.multiply(given, bias.to(device), out), want + bias.double()),
        ):
            assert got.dtype is dtype
            error = (got.double().cpu() - wanted).abs()
            assert (error <= TOLERANCE[dtype] * (2 * wanted.abs() + typical)).all()
        assert got is out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_with_scales_of_their_own_are_kept(name: str, device: str) -> None:
    """A quantized checkpoint is not rounded again, though no row's largest value is 448."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    op = make_op(name, FP8, dtype, device)
    values = (random(96, 64, seed=5) * 3).to(torch.float8_e4m3fn)
    scales = random(96, 1, seed=6).abs() + 0.1
    weight = op.make_weight(96, 64)
    weight.write(slice(0, 96), lambda target: target.copy_(values), scales.to(device))
    got = weight.values(slice(None)).cpu()
    torch.testing.assert_close(got, (values.float() * scales).to(dtype), rtol=0, atol=0)


def test_a_row_of_zeros_stays_zero() -> None:
    op = make_op("torch", FP8, torch.float32, "cpu")
    weight = op.make_weight(2, 64)
    weight.write(slice(0, 2), lambda target: target.zero_())
    got = weight.multiply(make_input(op, torch.zeros(1, 64)), None)
    assert torch.equal(got, torch.zeros(1, 2))


def test_fp8_takes_half_the_memory_where_it_runs() -> None:
    backend = next(b for b in registry.list_backends("linear") if b.name == "fp8")
    spec = LinearSpec(torch.bfloat16, torch.device("cpu"), FP8, tuple(SIZES))
    assert backend.probe(spec) is not None  # never on a CPU
    weight = backend.make(spec).make_weight(4096, 512)
    assert weight.nbytes == 4096 * 512 + 4 * 4096
