"""Grouped-query attention over the page pool."""

import torch

from loraplex.engine.model.forward_context import Activations, ForwardContext
from loraplex.engine.model.layers.lora_linear import LoRALinear
from loraplex.engine.model.layers.norm import RMSNorm


class Attention:
    """`project`, then `attend`, then `finish`: nothing but `activations` goes from one to the next,
    so that the first and the last may be captured in CUDA graphs without the middle one.

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

    def project(self, x: torch.Tensor, activations: Activations, ctx: ForwardContext) -> None:
        """q of x [T, hidden_size], its heads normed if they are to be, and turned by RoPE; K and V
        go to the tokens' pages."""
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
        """The attention op, on the tokens that it was planned for: all of `activations`."""
        ctx.attention.run(q=activations.q, kv=ctx.kv[self.qkv.layer], out=activations.attended)

    def finish(self, activations: Activations, ctx: ForwardContext) -> torch.Tensor:
        """The output projection, [T, hidden_size]."""
        return self.output(activations.attended.flatten(1), ctx)
