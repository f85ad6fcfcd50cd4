"""Allocates the fields of a LoRATable in the layout that kernels read fastest."""

import torch

LINE_MODULES = 8
"""Modules in a line of the L2 cache, 128 bytes: four fields of an adapter's layer."""


def make_fields(
    num_layers: int,
    num_modules: int,
    num_slots: int,
    device: torch.device | str,
    num_fields: int = 4,
) -> torch.Tensor:
    """Allocate zeros, int32 [num_fields, layers, modules, slots].

    The four fields of LoRA are rank, a_start, b_start and bits of scale. In memory the fields of an
    adapter's layer lie side by side, each with its modules side by side, and four of them start at
    a multiple of 128 bytes. So one read brings all of them into the L2 cache.
    """
    width = -(-num_modules // LINE_MODULES) * LINE_MODULES
    lines = torch.zeros(num_layers, num_slots, num_fields, width, dtype=torch.int32, device=device)
    return lines[..., :num_modules].permute(2, 0, 3, 1)
