"""The gated feed-forward block (SwiGLU, arXiv 2002.05202)."""

import torch

from loraplex.backends.fp8 import empty_rows
from loraplex.backends.linear.contract import LinearInput
from loraplex.engine.model.forward_context import ForwardContext
from loraplex.engine.model.layers.lora_linear import LoRALinear


class MLP:
    """Computes down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_up: LoRALinear, down: LoRALinear, writes_fp8: bool = False) -> None:
        """`writes_fp8`: see LinearOp.takes_fp8."""
        self.gate_up = gate_up
        self.down = down
        self._writes_fp8 = writes_fp8

    def __call__(self, x: LinearInput, ctx: ForwardContext) -> torch.Tensor:
        """Returns the shape of x, [T, hidden_size]."""
        gate_up = self.gate_up(x, ctx)
        num_tokens, width = gate_up.shape
        fp8 = empty_rows(num_tokens, width // 2, gate_up.device) if self._writes_fp8 else None
        return self.down(LinearInput(ctx.fused.silu_mul(gate_up, fp8), fp8), ctx)
