"""Applies token masks by PyTorch's operators."""

import torch


def apply_masks(values: torch.Tensor, places: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Returns the values with -inf for the tokens that masks exclude, where a NaN or +inf is NaN.

    Args:
        values: [R, vocabulary].
        places: int32 [R], the row of `masks` for each, -1 for none.
        masks: int32 [M, ceil(vocabulary / 32)]; bit i % 32 of word i / 32 allows token i.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=values.device)
    words = masks.index_select(0, places.clamp_min(0))
    bits = (words[:, :, None] >> shifts) & 1
    excluded = (bits.flatten(1)[:, : values.shape[1]] == 0) & (places >= 0)[:, None]
    return torch.where(excluded, values - torch.inf, values)
