"""Projections that share an input, fused into one GEMM. The adapters' part is added in place."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from loraplex.backends.collective.contract import CollectiveOp
from loraplex.backends.lora.contract import LoRAGroup
from loraplex.engine.model.forward_context import ForwardContext
from loraplex.memory.adapter_layout import MODULES, ROW_ALIGN, ModuleShape


def make_group(modules: tuple[str, ...], shapes: tuple[ModuleShape, ...]) -> LoRAGroup:
    """Returns the group of the named MODULES. Their outputs lie side by side in this order.

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
        row_align=ROW_ALIGN,
    )


class LoRALinear:
    """Computes y = x W^T + b and adds the adapters of this layer.

    Attributes:
        weight: [sum of out_features, in_features], the modules' rows one after another.
        bias: [sum of out_features] or None.
    """

    def __init__(
        self,
        group: LoRAGroup,
        layer: int,
        bias: bool,
        *,
        dtype: torch.dtype,
        device: torch.device,
        collective: CollectiveOp | None = None,
        role: int = 0,
    ) -> None:
        """With `collective` y is this rank's partial sum, of this role; see CollectiveOp."""
        self.group = group
        self._collective = collective
        self._role = role
        self.layer = layer
        width = sum(group.out_features)
        self.weight = torch.empty(width, group.in_features, dtype=dtype, device=device)
        self.bias = torch.empty(width, dtype=dtype, device=device) if bias else None

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Returns [T, sum of out_features] for x [T, in_features]."""
        y = self._product(x)
        ctx.shrink(x, self.layer, self.group)  # after the product, to overlap its last blocks
        ctx.expand(y, self.layer, self.group)
        return y

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._collective is None:
            return functional.linear(x, self.weight, self.bias)
        y = self._collective.partial(len(x), self._role)
        torch.mm(x, self.weight.t(), out=y)
        return y if self.bias is None else y.add_(self.bias)

    def parameters(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each module's rows under its own name, as views."""
        places = zip(
            self.group.modules, self.group.out_starts, self.group.out_features, strict=True
        )
        for module, start, width in places:
            name = f"{prefix}.{MODULES[module]}"
            yield f"{name}.weight", self.weight[start : start + width]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[start : start + width]
