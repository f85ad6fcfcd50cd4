"""Root-mean-square norm."""

import torch

from loraplex.backends.collective.contract import CollectiveOp
from loraplex.backends.fp8 import Fp8Rows, rows_like
from loraplex.backends.linear.contract import LinearInput
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
        writes_fp8: bool = False,
    ) -> None:
        """With `collective`, `add` takes partial sums. `writes_fp8`: see LinearOp.takes_fp8."""
        self.eps = eps
        self._writes_fp8 = writes_fp8
        self._collective = collective
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> LinearInput:
        """Returns the shape and dtype of x, [T, size]."""
        fp8 = self._fp8_rows(x)
        return LinearInput(ctx.fused.rms_norm(x, self.weight, self.eps, fp8), fp8)

    def add(self, x: torch.Tensor, residual: torch.Tensor, ctx: ForwardContext) -> LinearInput:
        """Add x to the residual, in place, and return the norm of the sum.

        Where the ranks hold partial sums, their total is added; see CollectiveOp.add_rms_norm.
        """
        if self._collective is not None:
            return LinearInput(self._collective.add_rms_norm(x, residual, self.weight, self.eps))
        fp8 = self._fp8_rows(x)
        return LinearInput(ctx.fused.add_rms_norm(x, residual, self.weight, self.eps, fp8), fp8)

    def _fp8_rows(self, x: torch.Tensor) -> Fp8Rows | None:
        return rows_like(x) if self._writes_fp8 else None
