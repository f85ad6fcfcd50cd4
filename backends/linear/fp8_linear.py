"""Backend ``fp8`` of op ``linear``: Hopper's fp8 tensor cores, by torch's scaled product.

W takes half the memory of 16 bits, and a decode step reads half the bytes of it.
"""

from typing import Any

import torch

from loraplex.backends.fp8 import Fp8Rows, empty_rows, quantize
from loraplex.backends.linear.contract import FP8, Fill, LinearInput, LinearSpec

ALIGN = 16
"""Sizes of W are multiples of it: the tensor cores take 16 bytes of a row."""

CHUNK_ROWS = 2048
"""Rows of W that are rounded at one time; bounds the scratch memory."""

LIBRARY_ERRORS = (RuntimeError, AttributeError, TypeError)


class Fp8Linear:
    name = "fp8"
    takes_fp8 = True

    @classmethod
    def probe(cls, spec: LinearSpec | None = None) -> str | None:
        """Returns None when usable, else the reason."""
        if not torch.cuda.is_available():
            return "it needs a CUDA GPU"
        if spec is None:
            return None
        if spec.form != FP8:
            return "the weights are not in fp8: --quantization fp8 makes them so"
        if spec.device.type != "cuda":
            return f"it needs a CUDA GPU, not {spec.device.type}"
        if torch.cuda.get_device_capability(spec.device)[0] < 9:
            return "it needs a GPU of compute capability 9.0 (Hopper)"
        if spec.dtype is not torch.bfloat16:
            return f"it takes bfloat16, not {spec.dtype}: set --dtype bfloat16"
        odd = [shape for shape in spec.shapes if any(size % ALIGN for size in shape)]
        if odd:
            return f"sizes of weights must be multiples of {ALIGN}, not {list(odd[0])}"
        try:
            return None if _is_right(spec.device) else "its self-test gave wrong results"
        except LIBRARY_ERRORS as error:
            return f"its self-test failed: {str(error).strip()[:500]}"

    def __init__(self, spec: LinearSpec) -> None:
        self._spec = spec

    def make_weight(self, out_features: int, in_features: int) -> "Fp8Weight":
        return Fp8Weight(empty_rows(out_features, in_features, self._spec.device))


class Fp8Weight:
    """Keeps e4m3, with a scale for each output channel."""

    def __init__(self, weight: Fp8Rows) -> None:
        self._weight = weight
        self.shape = (weight.values.shape[0], weight.values.shape[1])
        self.nbytes = weight.nbytes

    def write(self, rows: slice, fill: Fill, scales: torch.Tensor | None = None) -> None:
        part = Fp8Rows(self._weight.values[rows], self._weight.scales[rows])
        if scales is not None:
            fill(part.values)
            part.scales.copy_(scales)
            return
        staged = torch.empty_like(part.values, dtype=torch.bfloat16)
        fill(staged)
        for at in range(0, len(staged), CHUNK_ROWS):
            chunk = slice(at, at + CHUNK_ROWS)
            quantize(staged[chunk], Fp8Rows(part.values[chunk], part.scales[chunk]))

    def values(self, rows: slice) -> torch.Tensor:
        part = Fp8Rows(self._weight.values[rows], self._weight.scales[rows])
        return part.dequantize().bfloat16()

    def multiply(
        self, x: LinearInput, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert x.fp8 is not None
        return product(x.fp8, self._weight, bias, out)


def product(
    x: Fp8Rows, weight: Fp8Rows, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns x W^T + bias in bfloat16, written to `out` if that is given."""
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    if out is not None:
        options["out"] = out
    operands = (x.values, weight.values.t(), x.scales, weight.scales.t())
    if bias is None:
        return torch._scaled_mm(*operands, **options)
    try:
        return torch._scaled_mm(*operands, bias=bias, **options)
    except RuntimeError as error:
        # cuBLAS has no kernel with a bias for some sizes: one row of 48 outputs, for example.
        if "NOT_SUPPORTED" not in str(error):
            raise
    return torch._scaled_mm(*operands, **options).add_(bias)


def _is_right(device: torch.device) -> bool:
    """Returns whether a tiny product is right, with scales by row and a bias."""
    x, weight = empty_rows(8, 64, device), empty_rows(32, 64, device)
    generator = torch.Generator(device=device).manual_seed(0)
    for rows in (x, weight):
        quantize(torch.randn(rows.values.shape, device=device, generator=generator), rows)
    bias = torch.ones(32, dtype=torch.bfloat16, device=device)
    out = torch.empty(8, 32, dtype=torch.bfloat16, device=device)
    product(x, weight, bias, out)
    expected = x.dequantize() @ weight.dequantize().t() + 1
    return torch.allclose(out.float(), expected, atol=0.1, rtol=0.02)
