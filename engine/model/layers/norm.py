"""Root-mean-square norm."""

import torch

from loraplex.engine.model.forward_context import ForwardContext


class RMSNorm:
    """Norms the last axis by the op ``fused``.

    Attributes:
        weight: [size].
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Returns the shape and dtype of x, [T, size]."""
        return ctx.fused.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Add x to the residual, in place, and return the norm of the sum."""
        return ctx.fused.add_rms_norm(x, residual, self.weight, self.eps)
