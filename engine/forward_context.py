"""What one forward step hands down to the layers, besides the activations."""

from dataclasses import dataclass

import torch

from loraplex.backends.attention.contract import AttentionOp
from loraplex.backends.fused.contract import FusedOps
from loraplex.backends.lora.contract import LoRAGroup, LoRAOp, LoRATable


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
