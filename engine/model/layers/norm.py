"""Root-mean-square norm."""

import torch

from loraplex.engine.model.forward_context import ForwardContext


class RMSNorm:
    """Norm over the last axis, as the op ``fused`` does it.

    Attributes:
        weight: [size].
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[T, size] to the same shape and dtype."""
        return ctx.fused.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Add x to the residual, in place, and norm that."""
        return ctx.fused.add_rms_norm(x, residual, self.weight, self.eps)
