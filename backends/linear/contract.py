"""The contract of op ``linear``: the base model's projections, y = x W^T + b.

The op owns the weights. It decides how their numbers are stored, and layers never see that form.
The weights of the adapters, of the norms, of the embedding and of the head are not its concern.

Two forms of weights exist:

- *plain*: in the model's dtype.
- *fp8*: W and x are rounded to e4m3. W has a scale for each output channel, x one for each token,
  chosen from its largest magnitude::

      y = (x8 @ w8.T) * x_scales * w_scales.T + b        summed in float32
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.backends.fp8 import Fp8Rows

PLAIN, FP8 = "plain", "fp8"

Fill = Callable[[torch.Tensor], None]
"""Writes all elements of a tensor."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """Static values of one worker rank."""

    dtype: torch.dtype  # of x and y
    device: torch.device
    form: str  # PLAIN or FP8
    shapes: tuple[tuple[int, int], ...] = ()  # (out_features, in_features) of all weights


@dataclass(frozen=True, slots=True)
class LinearInput:
    """The input of a projection and of the adapters on it."""

    x: torch.Tensor  # [T, in_features], any row stride
    fp8: Fp8Rows | None = None  # x in e4m3, see FusedOps.quantize_rows


class LinearWeight(Protocol):
    """One weight matrix, [out_features, in_features], uninitialised at first."""

    shape: tuple[int, int]
    nbytes: int

    def write(self, rows: slice, fill: Fill, scales: torch.Tensor | None = None) -> None:
        """Writes some rows.

        Args:
            fill: gets a tensor [rows, in_features] on the device, of any dtype, and writes to it.
            scales: float32 [rows, 1] on any device, a factor for what `fill` writes, which is then
                e4m3; None: it writes the weights themselves.
        """
        ...

    def values(self, rows: slice) -> torch.Tensor:
        """Returns some rows as the product sees them, in the model's dtype: a view if plain."""
        ...

    def multiply(
        self, x: LinearInput, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns x W^T + bias, [T, out_features]; it is `out`, if that is given.

        It never syncs, and the same input gives the same bits.
        """
        ...


class LinearOp(Protocol):
    """One backend, made once a worker with a LinearSpec.

    Attributes:
        takes_fp8: whether `multiply` needs `LinearInput.fp8`.
    """

    name: str
    takes_fp8: bool

    def make_weight(self, out_features: int, in_features: int) -> LinearWeight:
        """Takes the memory of one of the spec's weights."""
        ...
