"""What one forward step hands down to the layers, besides the activations."""

from dataclasses import dataclass

import torch

from loraplex.backends.attention.contract import AttentionOp
from loraplex.backends.lora.contract import LoRABatch, LoRAGroup, LoRAOp, LoRATable


@dataclass(slots=True)
class ForwardContext:
    """Made once a step by the model runner and passed to every layer."""

    positions: torch.Tensor  # int64 [T]
    kv_rows: torch.Tensor  # int64 [T], see AttentionBatch.kv_rows
    pool: torch.Tensor  # [num_layers, num_pages, page_elems]
    kv: (
        torch.Tensor
    )  # the same memory, [num_layers, num_pages, 2, block_tokens, kv_heads, head_dim]
    attention: AttentionOp  # already planned for this step
    lora: LoRAOp
    lora_table: LoRATable
    lora_batch: LoRABatch

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, layer: int, group: LoRAGroup) -> None:
        """Add the adapters' part of one group of projections to y, in place."""
        if not self.lora_batch.is_empty:
            self.lora.apply(
                y=y,
                x=x,
                pool=self.pool,
                layer=layer,
                group=group,
                table=self.lora_table,
                batch=self.lora_batch,
            )
