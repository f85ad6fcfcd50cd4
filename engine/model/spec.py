"""The sizes and parts of a decoder of the Llama family, declared once per checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import torch


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
