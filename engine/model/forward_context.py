"""The context of one forward step, which every layer gets."""

from dataclasses import dataclass
from typing import Any

import torch

from loraplex.backends.attention.contract import AttentionOp, AttentionPlan
from loraplex.backends.fused.contract import FusedOps
from loraplex.backends.lora.contract import LoRAGroup, LoRAKernels, LoRAPlan
from loraplex.engine.model.vocabulary_change import VocabularyChange


@dataclass(frozen=True, slots=True)
class Activations:
    """Everything that a forward step carries across the attention op, from the first half of each
    layer to the second half and on to the next layer."""

    residual: torch.Tensor  # [T, hidden_size]; each layer adds to it
    cos_sin: torch.Tensor  # float32 [T, head_dim], see FusedOps.rope_store_kv
    q: torch.Tensor  # [T, num_heads, head_dim], contiguous; each layer overwrites it
    attended: torch.Tensor  # the same, the attention op's output

    def first(self, num_tokens: int) -> "Activations":
        """Returns views of the first tokens."""
        return Activations(
            self.residual[:num_tokens],
            self.cos_sin[:num_tokens],
            self.q[:num_tokens],
            self.attended[:num_tokens],
        )


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Made once a step by the model runner and passed to every layer."""

    positions: torch.Tensor  # int64 [T]
    kv_rows: torch.Tensor
    """int64 [T]: where each token's K goes in a layer of the pool seen as [num_pages * 2 *
    block_tokens, num_kv_heads, head_dim]; its V goes block_tokens rows later."""
    pool: torch.Tensor  # [num_layers, num_pages, page_elems]
    kv: torch.Tensor
    """The same memory: [num_layers, num_pages, 2, block_tokens, kv_heads, head_dim]."""
    attention: AttentionOp
    attention_plan: AttentionPlan | None  # None: the step's attention runs elsewhere
    fused: FusedOps
    lora: LoRAKernels[Any]
    lora_plan: LoRAPlan | None  # None: no row has an adapter, and nothing is launched
    vocabulary: VocabularyChange | None = None  # of the embedding, by adapters of the step

    def attend(self, q: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        """Run the attention op on one layer; see AttentionOp.run."""
        self.attention.run(self.attention_plan, q=q, kv=self.kv[layer], out=out)

    def shrink(self, x: torch.Tensor, layer: int, group: LoRAGroup) -> None:
        """Begin the adapters' part of one group of projections of x."""
        if self.lora_plan is not None:
            self.lora.shrink(self.lora_plan, x=x, pool=self.pool, layer=layer, group=group)

    def expand(self, y: torch.Tensor, layer: int, group: LoRAGroup) -> None:
        """Add the adapters' part to y, in place."""
        if self.lora_plan is not None:
            self.lora.expand(self.lora_plan, y=y, pool=self.pool, layer=layer, group=group)
