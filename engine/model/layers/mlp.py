"""The gated feed-forward block (SwiGLU, arXiv 2002.05202)."""

import torch

from loraplex.engine.model.forward_context import ForwardContext
from loraplex.engine.model.layers.lora_linear import LoRALinear


class MLP:
    """Computes down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_up: LoRALinear, down: LoRALinear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Returns the shape of x, [T, hidden_size]."""
        return self.down(ctx.fused.silu_mul(self.gate_up(x, ctx)), ctx)
