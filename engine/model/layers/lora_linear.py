"""Projections that share an input, fused into one GEMM. The adapters' part is added in place."""

from collections.abc import Iterator

import torch

from loraplex.backends.collective.contract import CollectiveOp
from loraplex.backends.linear.contract import LinearInput, LinearOp
from loraplex.backends.lora.contract import LoRAGroup
from loraplex.engine.model.forward_context import ForwardContext
from loraplex.engine.model.modules import ModuleSpec
from loraplex.engine.model.shard import ModuleShard
from loraplex.engine.model.weight_slot import RowsSlot, TensorSlot, WeightSlot
from loraplex.memory.adapter_layout import ROW_ALIGN


def make_group(modules: tuple[ModuleShard, ...], number: int) -> LoRAGroup:
    """Returns the group of this number. Its modules' outputs lie side by side.

    Args:
        modules: all of the layer's, in the order of their ids.
    """
    ids = tuple(i for i, module in enumerate(modules) if module.spec.group == number)
    widths = tuple(modules[i].outputs.size for i in ids)
    return LoRAGroup(
        modules=ids,
        in_features=modules[ids[0]].inputs.size,
        out_starts=tuple(sum(widths[:i]) for i in range(len(widths))),
        out_features=widths,
        row_align=ROW_ALIGN,
    )


class LoRALinear:
    """Computes y = x W^T + b and adds the adapters of this layer.

    Attributes:
        bias: [sum of out_features], the modules' one after another, or None.
    """

    def __init__(
        self,
        group: LoRAGroup,
        layer: int,
        modules: tuple[ModuleSpec, ...],
        *,
        linear: LinearOp,
        dtype: torch.dtype,
        device: torch.device,
        collective: CollectiveOp | None = None,
        role: int = 0,
    ) -> None:
        """Takes the memory.

        Args:
            modules: the group's.
            linear: owns the weight.
            dtype, device: of the bias.
            collective: y is then this rank's partial sum, of this role; see CollectiveOp.
        """
        self.group = group
        self._modules = modules
        self._collective = collective
        self._role = role
        self.layer = layer
        width = sum(group.out_features)
        self._linear = linear
        self._weight = linear.make_weight(width, group.in_features)
        self.bias = torch.empty(width, dtype=dtype, device=device) if modules[0].has_bias else None

    @property
    def weight(self) -> torch.Tensor:
        """The weight's numbers, [sum of out_features, in_features]; see LinearWeight.values."""
        return self._weight.values(slice(None))

    def __call__(self, x: LinearInput, ctx: ForwardContext) -> torch.Tensor:
        """Returns [T, sum of out_features] for x [T, in_features]."""
        if self._linear.takes_fp8 and x.fp8 is None:
            x = LinearInput(x.x, ctx.fused.quantize_rows(x.x))
        out = None
        if self._collective is not None:
            out = self._collective.partial(len(x.x), self._role)
        y = self._weight.multiply(x, self.bias, out)
        ctx.shrink(x.x, self.layer, self.group)  # after the product, to overlap its last blocks
        ctx.expand(y, self.layer, self.group)
        return y

    def weight_of(self, module: int) -> torch.Tensor:
        """Returns this rank's weight of a module (its id), [out_features, in_features]."""
        return self._weight.values(self._rows(module))

    def bias_of(self, module: int) -> torch.Tensor | None:
        """Returns this rank's bias of a module (its id), [out_features]."""
        return None if self.bias is None else self.bias[self._rows(module)]

    def _rows(self, module: int) -> slice:
        index = self.group.modules.index(module)
        start = self.group.out_starts[index]
        return slice(start, start + self.group.out_features[index])

    def slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        """Yields each module's rows under its own name."""
        places = zip(self._modules, self.group.out_starts, self.group.out_features, strict=True)
        for module, start, width in places:
            name = f"{prefix}.{module.name}"
            rows = slice(start, start + width)
            yield f"{name}.weight", RowsSlot(self._weight, rows)
            if self.bias is not None:
                yield f"{name}.bias", TensorSlot(self.bias[rows])
