"""Matrices in e4m3 (8 bits: 4 of exponent, 3 of mantissa) with a scale for each row.

Both sides of an fp8 product have this form: tokens of activations, and output channels of weights.
"""

from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_SCALE = 1e-12
"""Scale of a row of zeros, which must not divide by zero."""


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Row i stands for values[i] * scales[i]."""

    values: torch.Tensor  # e4m3 [rows, columns], contiguous
    scales: torch.Tensor  # float32 [rows, 1]

    def dequantize(self) -> torch.Tensor:
        """Returns float32 [rows, columns]."""
        return self.values.float() * self.scales

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def why_not_e4m3(device: torch.device) -> str | None:
    """Returns None if a GPU's kernels can convert e4m3, else the reason."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    major, minor = capability
    return f"weights in e4m3 need compute capability 8.9 or later, not {major}.{minor}"


def empty_rows(num_rows: int, num_columns: int, device: torch.device) -> Fp8Rows:
    """Returns uninitialised rows."""
    return Fp8Rows(
        torch.empty(num_rows, num_columns, dtype=E4M3, device=device),
        torch.empty(num_rows, 1, dtype=torch.float32, device=device),
    )


def rows_like(x: torch.Tensor) -> Fp8Rows:
    """Returns uninitialised rows for x [rows, columns], on its device."""
    return empty_rows(x.shape[0], x.shape[1], x.device)


def quantize(x: torch.Tensor, out: Fp8Rows) -> None:
    """Writes x [rows, columns] to `out`. A row's largest magnitude becomes E4M3_MAX."""
    x32 = x.float()
    largest = x32.abs().amax(dim=-1, keepdim=True)
    # On a GPU torch divides by a number through its reciprocal, by a tensor exactly. The last bit
    # of a scale decides which way a value rounds that lies between two.
    most = torch.full_like(largest, E4M3_MAX)
    torch.clamp(largest / most, min=MIN_SCALE, out=out.scales)
    out.values.copy_(saturate(x32 / out.scales))


def saturate(x: torch.Tensor) -> torch.Tensor:
    """Returns x in e4m3. Magnitudes above E4M3_MAX become E4M3_MAX; NaN stays."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
