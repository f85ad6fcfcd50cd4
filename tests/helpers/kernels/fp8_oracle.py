"""The oracle of e4m3: numbers made from their bits, and a row at a time."""

import os

import numpy as np
import torch


def _value(bits: int) -> float:
    """Returns the number of 7 bits: 4 of exponent with bias 7, 3 of mantissa."""
    exponent, mantissa = bits >> 3, bits & 7
    if exponent == 0:
        return mantissa * 2.0**-9
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


MAGNITUDES = np.array([_value(bits) for bits in range(127)])  # 127 is NaN
MAX = 448.0


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Returns the nearest e4m3 numbers, float64; of two as near, the one with even bits."""
    size = np.minimum(np.abs(x.astype(np.float64)), MAX)
    above = np.searchsorted(MAGNITUDES, size).clip(1)
    low, high = MAGNITUDES[above - 1], MAGNITUDES[above]
    is_high = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return np.copysign(np.where(is_high, high, low), x)


def quantize_oracle(x: torch.Tensor) -> torch.Tensor:
    """Returns [rows, columns] rounded to e4m3 with a float32 scale a row; float64."""
    rows = []
    for row in x.float().numpy():
        scale = np.maximum(np.float32(np.abs(row).max() / np.float32(MAX)), np.float32(1e-12))
        rows.append(round_e4m3(row / scale) * np.float64(scale))
    return torch.from_numpy(np.stack(rows))


def is_judged(exact: np.ndarray) -> np.ndarray:
    """Returns which numbers can be judged once rounded: all, but for some in Triton's interpreter.

    Where rounding up carries into the exponent, the interpreter (3.9) loses the carry. It cuts
    subnormal numbers off, and rounds a number between two others away from zero.
    """
    rounded = round_e4m3(exact)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return np.ones(exact.shape, dtype=bool)
    mantissa, exponent = np.frexp(np.abs(rounded))
    is_between = np.abs(exact - rounded) * 2 == np.ldexp(1.0, exponent - 4)
    return (mantissa != 0.5) & (exponent > -5) & ~is_between
