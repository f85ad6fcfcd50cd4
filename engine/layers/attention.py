"""Grouped-query attention over the page pool."""

import torch

from loraplex.engine.forward_context import ForwardContext
from loraplex.engine.layers.lora_linear import LoRALinear
from loraplex.engine.layers.norm import RMSNorm


class Attention:
    """Projections, optional norm of each head, RoPE, the attention op, and the output projection.

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

    def __call__(self, x: torch.Tensor, cos_sin: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[T, hidden_size] to the same shape. Writes K and V of the tokens into their pages."""
        kv_layer = ctx.kv[self.qkv.layer]
        q = ctx.fused.rope_store_kv(
            qkv=self.qkv(x, ctx),
            cos_sin=cos_sin,
            kv=kv_layer,
            kv_rows=ctx.kv_rows,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
        )
        out = torch.empty_like(q)
        ctx.attention.run(q=q, kv=kv_layer, out=out)
        return self.output(out.view(len(q), -1), ctx)
