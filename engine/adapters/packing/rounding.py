"""Rounds A and B to e4m3 with one scale for each module, which goes into the adapter's scale.

B A is a sum over ranks: a column of B times a row of A. Powers of two pass from the one to the
other and change nothing. So the row and the column of each rank are multiplied by powers of two,
such that the largest rank uses the top of e4m3 in both and all ranks of a module share one scale.
A smaller rank lies lower in e4m3, which rounds to 4 bits in 12 powers of two below the top. So a
rank loses precision only where it adds about 2^-24 of what the largest rank adds.

A power of two as scale costs nothing: e4m3 rounds by the size of a number, not of its row. But
numbers become smaller on the whole, by 0.1 % where bfloat16 was rounded, because ties go to even
numbers. The scale makes up for it.
"""

import torch

from loraplex.backends.fp8 import E4M3

TOP = 6
"""Numbers become at most 2^TOP. Two e4m3 numbers of that size, or four, are finite as one number of
16 or 32 bits, which the KV cache that uses the page next may read. And x A keeps its place in
float16 when the scale of a small B is in it."""
SMALLEST = 2.0**-100
"""A row that has no larger number is rounded to zeros."""


def round_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds the matrices of one module in some layers.

    Args:
        a: float32 [layers, rank, in_features].
        b: float32 [layers, out_features, rank].

    Returns:
        A and B in e4m3, and their scale, float32 [layers]: A B is their product times it. The scale
        of a layer that holds NaN or infinite numbers is NaN.
    """
    a_most, b_most = (torch.maximum(m.amax(d), -m.amin(d)) for m, d in ((a, 2), (b, 1)))
    a_exponent, b_exponent = a_most.frexp().exponent, b_most.frexp().exponent  # [layers, rank]
    has_a, has_b = a_most >= SMALLEST, b_most >= SMALLEST
    of_both = torch.where(has_a & has_b, a_exponent + b_exponent, -300)
    largest = of_both.amax(1, keepdim=True)
    below = torch.where(has_a & has_b, largest - of_both, 0)
    a_shift = torch.where(has_a, TOP - a_exponent - below // 2, 0)
    b_shift = torch.where(has_b, TOP - b_exponent - (below - below // 2), 0)
    a8, a_factor = _round(a * _power_of_two(a_shift)[:, :, None])
    b8, b_factor = _round(b * _power_of_two(b_shift)[:, None, :])
    is_finite = (a_most.isfinite() & b_most.isfinite()).all(1)
    exponent = torch.where(largest == -300, 0, largest - 2 * TOP)[:, 0]
    scale = torch.where(is_finite, _power_of_two(exponent) * a_factor * b_factor, torch.nan)
    return a8, b8, scale


def _round(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the matrix in e4m3, and for each layer the factor by which it must be multiplied to
    be as large as before in the direction of the exact one."""
    rounded = matrix.to(E4M3)
    before = matrix.square().sum((1, 2))
    after = (matrix * rounded.float()).sum((1, 2))
    return rounded, torch.where(after > 0, before / after, 1)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Returns 2 to each exponent, float32."""
    return torch.ldexp(torch.ones(exponents.shape), exponents)
