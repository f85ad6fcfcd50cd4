"""Hugging Face models that round to e4m3 as an engine with fp8 weights or fp8 pages does."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from helpers.kernels.fp8_oracle import quantize_oracle, round_e4m3


def round_weights(model: PreTrainedModel) -> None:
    """Rounds the weights of the projections, and in each call their input. The head stays."""

    def round_input(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        (x,) = args
        return (quantize_oracle(x.flatten(0, -2)).to(x.dtype).view(x.shape),)

    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = quantize_oracle(module.weight.data).to(module.weight.dtype)
            module.register_forward_pre_hook(round_input)


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
