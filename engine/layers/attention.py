"""Grouped-query attention over the page pool."""

import torch

from loraplex.engine.forward_context import ForwardContext
from loraplex.engine.layers.lora_linear import LoRALinear
from loraplex.engine.layers.norm import RMSNorm
from loraplex.engine.layers.rope import rotate


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layer: torch.Tensor,
    kv_rows: torch.Tensor,
    block_tokens: int,
) -> None:
    """Write each token's K and V into its page.

    Args:
        k: [T, kv_heads, head_dim]; v alike.
        kv_layer: [num_pages, 2, block_tokens, kv_heads, head_dim], one layer of the pool; mutated.
        kv_rows: int64 [T], K's row in the layer seen as rows; V's lies `block_tokens` later.
    """
    rows = kv_layer.view(-1, *kv_layer.shape[3:])
    rows.index_copy_(0, kv_rows, k)
    rows[block_tokens:].index_copy_(0, kv_rows, v)


class Attention:
    """Projections, optional norm of each head, RoPE, the attention op, and the output projection.

    Attributes:
        q_norm, k_norm: RMSNorm over head_dim, or None.
    """

    def __init__(
        self,
        qkv: LoRALinear,
        output: LoRALinear,
        head_dim: int,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.head_dim = head_dim
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ctx: ForwardContext
    ) -> torch.Tensor:
        """[T, hidden_size] to the same shape. Writes K and V of the tokens into their pages."""
        num_tokens = x.shape[0]
        parts = self.qkv(x, ctx).split(self.qkv.group.out_features, dim=-1)
        q, k, v = (part.view(num_tokens, -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        kv_layer = ctx.kv[self.qkv.layer]
        store_kv(k, v, kv_layer, ctx.kv_rows, kv_layer.shape[2])
        out = torch.empty_like(q)
        ctx.attention.run(q=q, kv=kv_layer, out=out)
        return self.output(out.view(num_tokens, -1), ctx)
