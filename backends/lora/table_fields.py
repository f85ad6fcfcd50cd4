"""Allocates the fields of a LoRATable in the layout that kernels read fastest."""

import torch

LINE_MODULES = 8
"""Modules in a line of the L2 cache, 128 bytes: four fields of an adapter's layer."""


def make_fields(
    num_layers: int, num_modules: int, num_slots: int, device: torch.device | str
) -> torch.Tensor:
    """Allocate zeros, int32 [4, layers, modules, slots]: rank, a_start, b_start, bits of scale.

    In memory the four fields of an adapter's layer lie side by side, each with its modules side by
    side, and start at a multiple of 128 bytes. So one read brings all of them into the L2 cache.
    """
    width = -(-num_modules // LINE_MODULES) * LINE_MODULES
    lines = torch.zeros(num_layers, num_slots, 4, width, dtype=torch.int32, device=device)
    return lines[..., :num_modules].permute(2, 0, 3, 1)
