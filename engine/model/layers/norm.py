"""Root-mean-square norm."""

import torch

from loraplex.backends.collective.contract import CollectiveOp
from loraplex.engine.model.forward_context import ForwardContext


class RMSNorm:
    """Norms the last axis by the op ``fused``.

    Attributes:
        weight: [size].
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        collective: CollectiveOp | None = None,
    ) -> None:
        """With `collective`, `add` takes partial sums."""
        self.eps = eps
        self._collective = collective
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Returns the shape and dtype of x, [T, size]."""
        return ctx.fused.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Add x to the residual, in place, and return the norm of the sum.

        Where the ranks hold partial sums, their total is added; see CollectiveOp.add_rms_norm.
        """
        if self._collective is not None:
            return self._collective.add_rms_norm(x, residual, self.weight, self.eps)
        return ctx.fused.add_rms_norm(x, residual, self.weight, self.eps)
