"""What one forward step hands down to the layers."""

from dataclasses import dataclass

import torch

from loraplex.backends.attention.contract import AttentionOp
from loraplex.backends.fused.contract import FusedOps
from loraplex.backends.lora.contract import LoRAGroup, LoRAOp, LoRATable


@dataclass(frozen=True, slots=True)
class Activations:
    """What a forward step carries past the attention op, from each layer's first half to its
    second and on; all else that layers make is gone by then."""

    residual: torch.Tensor  # [T, hidden_size]; each layer adds to it
    cos_sin: torch.Tensor  # float32 [T, head_dim], see FusedOps.rope_store_kv
    q: torch.Tensor  # [T, num_heads, head_dim], contiguous, of one layer after the other
    attended: torch.Tensor  # the same, what attention makes of it

    def first(self, num_tokens: int) -> "Activations":
        """Of the first tokens: the same memory."""
        return Activations(
            self.residual[:num_tokens],
            self.cos_sin[:num_tokens],
            self.q[:num_tokens],
            self.attended[:num_tokens],
        )


@dataclass(slots=True)
class ForwardContext:
    """Made once a step by the model runner and passed to every layer."""

    positions: torch.Tensor  # int64 [T]
    kv_rows: torch.Tensor
    """int64 [T]: where each token's K goes in a layer of the pool seen as [num_pages * 2 *
    block_tokens, num_kv_heads, head_dim]; its V goes block_tokens rows later."""
    pool: torch.Tensor  # [num_layers, num_pages, page_elems]
    kv: (
        torch.Tensor
    )  # the same memory, [num_layers, num_pages, 2, block_tokens, kv_heads, head_dim]
    attention: AttentionOp  # already planned for this step
    fused: FusedOps
    lora: LoRAOp  # likewise
    lora_table: LoRATable
    has_lora: bool  # False: no row of the step has an adapter, and nothing is launched

    def shrink(self, x: torch.Tensor, layer: int, group: LoRAGroup) -> None:
        """Begin the adapters' part of one group of projections of x."""
        if self.has_lora:
            self.lora.shrink(x=x, pool=self.pool, layer=layer, group=group, table=self.lora_table)

    def expand(self, y: torch.Tensor, layer: int, group: LoRAGroup) -> None:
        """Add it to y, in place."""
        if self.has_lora:
            self.lora.expand(y=y, pool=self.pool, layer=layer, group=group, table=self.lora_table)
