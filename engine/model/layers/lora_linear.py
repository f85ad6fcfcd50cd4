"""Projections that share an input, fused to one GEMM, with the adapters' part added in place."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from loraplex.backends.lora.contract import LoRAGroup
from loraplex.engine.model.forward_context import ForwardContext
from loraplex.memory.adapter_layout import MODULES, ModuleShape


def make_group(modules: tuple[str, ...], shapes: tuple[ModuleShape, ...]) -> LoRAGroup:
    """The group of the named MODULES, whose outputs lie side by side in the order given.

    Args:
        shapes: of all MODULES, in that order.
    """
    ids = tuple(MODULES.index(name) for name in modules)
    widths = tuple(shapes[i].out_features for i in ids)
    return LoRAGroup(
        modules=ids,
        in_features=shapes[ids[0]].in_features,
        out_starts=tuple(sum(widths[:i]) for i in range(len(widths))),
        out_features=widths,
    )


class LoRALinear:
    """y = x W^T + b, and the adapters of this layer on top.

    Attributes:
        weight: [sum of out_features, in_features], the modules' rows one after another.
        bias: [sum of out_features] or None.
    """

    def __init__(
        self, group: LoRAGroup, layer: int, bias: bool, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.group = group
        self.layer = layer
        width = sum(group.out_features)
        self.weight = torch.empty(width, group.in_features, dtype=dtype, device=device)
        self.bias = torch.empty(width, dtype=dtype, device=device) if bias else None

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[T, in_features] to [T, sum of out_features]."""
        y = functional.linear(x, self.weight, self.bias)
        ctx.shrink(x, self.layer, self.group)  # behind the product, whose last blocks it overlaps
        ctx.expand(y, self.layer, self.group)
        return y

    def parameters(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Each module's rows under its own name, as views."""
        places = zip(
            self.group.modules, self.group.out_starts, self.group.out_features, strict=True
        )
        for module, start, width in places:
            name = f"{prefix}.{MODULES[module]}"
            yield f"{name}.weight", self.weight[start : start + width]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[start : start + width]
