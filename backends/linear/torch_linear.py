"""Backend ``torch`` of op ``linear``: PyTorch's product in the model's dtype. Runs anywhere.

Weights in form fp8 are rounded as the fp8 backend rounds them, and so is x, but both are kept in
the model's dtype. So the answers are the fp8 backend's up to the order of sums; no memory is saved.
"""

import torch
from torch.nn import functional

from loraplex.backends.fp8 import quantize, rows_like
from loraplex.backends.linear.contract import FP8, Fill, LinearInput, LinearSpec


class TorchLinear:
    name = "torch"

    @staticmethod
    def probe(spec: LinearSpec | None = None) -> str | None:
        return None

    def __init__(self, spec: LinearSpec) -> None:
        self._spec = spec
        self.takes_fp8 = spec.form == FP8

    def make_weight(self, out_features: int, in_features: int) -> "PlainWeight":
        spec = self._spec
        tensor = torch.empty(out_features, in_features, dtype=spec.dtype, device=spec.device)
        return RoundedWeight(tensor) if self.takes_fp8 else PlainWeight(tensor)


class PlainWeight:
    """Keeps the numbers in the model's dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.nbytes = tensor.nbytes

    def write(self, rows: slice, fill: Fill, scales: torch.Tensor | None = None) -> None:
        fill(self.tensor[rows])
        if scales is not None:
            self.tensor[rows] *= scales.to(self.tensor.device)

    def values(self, rows: slice) -> torch.Tensor:
        return self.tensor[rows]

    def multiply(
        self, x: LinearInput, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._product(x.x, bias, out)

    def _product(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        if out is None:
            return functional.linear(x, self.tensor, bias)
        torch.mm(x, self.tensor.t(), out=out)
        return out if bias is None else out.add_(bias)


class RoundedWeight(PlainWeight):
    """Rounds W and x to e4m3 and back."""

    def write(self, rows: slice, fill: Fill, scales: torch.Tensor | None = None) -> None:
        super().write(rows, fill, scales)
        if scales is None:
            part = self.tensor[rows]
            rounded = rows_like(part)
            quantize(part, rounded)
            part.copy_(rounded.dequantize())

    def multiply(
        self, x: LinearInput, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert x.fp8 is not None
        return self._product(x.fp8.dequantize().to(x.x.dtype), bias, out)
