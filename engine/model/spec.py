"""The sizes and parts of a decoder of the Llama family, declared once per checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import torch

from loraplex.engine.model.modules import ModuleSpec, llama_modules

SIZE_LIMITS = {
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_layers": 1024,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 4096,
    "vocab_size": 1 << 24,
    "max_position": 1 << 30,
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and switches of one base model, read from config.json or GGUF metadata."""

    architecture: str  # as Hugging Face names it: LlamaForCausalLM, Qwen3ForCausalLM, ...
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # longest context the checkpoint declares (its attention window, if shorter)
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # see layers/rope.py; {} for none
    qkv_bias: bool = False
    output_bias: bool = False  # a bias on o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE
    tie_embeddings: bool = False
    dtype: torch.dtype = torch.float32  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    fingerprint: str = ""  # identifies the base in prefix-cache keys

    @property
    def modules(self) -> tuple[ModuleSpec, ...]:
        """The projections that adapters may change, in the order of their ids."""
        return llama_modules(
            qkv_bias=self.qkv_bias, output_bias=self.output_bias, mlp_bias=self.mlp_bias
        )

    def __post_init__(self) -> None:
        """Raises ValueError for a size that no model has, before anything is allocated by it."""
        for name, limit in SIZE_LIMITS.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ValueError(f"{name} must lie in [1, {limit}], got {value:.6g}")
