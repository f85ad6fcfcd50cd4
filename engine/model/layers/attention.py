"""Grouped-query attention over the page pool."""

import torch

from loraplex.backends.linear.contract import LinearInput
from loraplex.engine.model.forward_context import Activations, ForwardContext
from loraplex.engine.model.layers.lora_linear import LoRALinear
from loraplex.engine.model.layers.norm import RMSNorm


class Attention:
    """Runs as `project`, then `attend`, then `finish`.

    Only `activations` go from one to the next, so CUDA graphs may hold the first and the last
    while the middle one runs eagerly.

    Attributes:
        q_norm, k_norm: RMSNorm over head_dim, or None.
    """

    def __init__(
        self,
        qkv: LoRALinear,
        output: LoRALinear,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.q_norm = q_norm
        self.k_norm = k_norm

    def project(self, x: LinearInput, activations: Activations, ctx: ForwardContext) -> None:
        """Write q to `activations` and K and V to the tokens' pages, normed and rotated by RoPE.

        Args:
            x: [T, hidden_size].
        """
        ctx.fused.rope_store_kv(
            qkv=self.qkv(x, ctx),
            cos_sin=activations.cos_sin,
            kv=ctx.kv[self.qkv.layer],
            kv_rows=ctx.kv_rows,
            out=activations.q,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
        )

    def attend(self, activations: Activations, ctx: ForwardContext) -> None:
        """Run the attention op. `activations` are of exactly the planned tokens."""
        ctx.attend(activations.q, self.qkv.layer, out=activations.attended)

    def finish(self, activations: Activations, ctx: ForwardContext) -> torch.Tensor:
        """Returns the output projection, [T, hidden_size]."""
        return self.output(LinearInput(activations.attended.flatten(1)), ctx)
