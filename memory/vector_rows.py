"""Vectors of adapters in two rows of a pool's dtype, see memory/adapter_layout.py."""

import torch


def split_vector(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns [..., VECTOR_ROWS, n] in `dtype`, whose rows add up to float32 values [..., n].

    The first row is the value rounded to `dtype`, the second what rounding has taken away.
    """
    rounded = values.to(dtype)
    return torch.stack((rounded, (values - rounded.float()).to(dtype)), dim=-2)


def join_vector(rows: torch.Tensor) -> torch.Tensor:
    """Returns float32 [..., n] of rows [..., VECTOR_ROWS, n]."""
    return rows.float().sum(dim=-2)
