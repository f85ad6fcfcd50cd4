"""Hugging Face models that round to e4m3 as an engine with fp8 weights or fp8 pages does."""

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from helpers.kernels.fp8_oracle import quantize_oracle, round_e4m3

ROW_PARALLEL = ("o_proj", "down_proj")


def round_weights(model: PreTrainedModel, ranks: int = 1) -> None:
    """Rounds the weights of the projections, and in each call their input. The head stays.

    Each rank of a split model rounds its columns of a row-parallel projection by themselves.
    """
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            parts = ranks if name.endswith(ROW_PARALLEL) else 1
            module.weight.data = _rounded(module.weight.data, parts)
            module.register_forward_pre_hook(partial(_round_input, parts))


def _round_input(parts: int, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
    (x,) = args
    return (_rounded(x.flatten(0, -2), parts).view(x.shape),)


def _rounded(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """Returns rows rounded in equal stretches, the last one shorter if they do not divide."""
    size = -(-rows.shape[1] // parts)
    return torch.cat([quantize_oracle(part).to(rows.dtype) for part in rows.split(size, 1)], 1)


class RoundedCache(DynamicCache):
    """Gives K and V back rounded to e4m3, those of the tokens that are fed too."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = (
            torch.from_numpy(round_e4m3(x.numpy())).to(x.dtype) for x in (key_states, value_states)
        )
        return super().update(*rounded, layer_idx, *args, **options)
