"""Reads a model's spec from the metadata of a GGUF file."""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from loraplex.engine.checkpoint.gguf_file import GGUFFile
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.spec import ModelSpec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_FLOAT_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def spec_from_gguf(path: Path) -> tuple[ModelSpec, bytes]:
    """Returns the spec and bytes that identify the metadata.

    Raises:
        ConfigError: see load_spec.
    """
    file = GGUFFile(path)
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{path}: GGUF architecture {name!r} is not supported; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        spec = _build(file, name)
    except (KeyError, TypeError, ValueError) as error:
        what = f"the file has no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path}: {what}") from None
    sizes = {key: value for key, value in file.metadata.items() if not isinstance(value, list)}
    return spec, json.dumps(sizes, sort_keys=True).encode()


def _build(file: GGUFFile, name: str) -> ModelSpec:
    def read(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{name}.{key}", default)

    def need(key: str) -> Any:
        return file.metadata[f"{name}.{key}"]

    if read("expert_count", 0):
        raise ValueError("mixture-of-experts models are not supported")
    num_heads = int(need("attention.head_count"))
    hidden_size = int(need("embedding_length"))
    head_dim = int(read("attention.key_length", hidden_size // num_heads))
    for key in ("rope.dimension_count", "attention.value_length"):
        if read(key, head_dim) != head_dim:
            raise ValueError(f"{name}.{key} {read(key)} differs from the head size {head_dim}")
    limit = int(need("context_length"))
    window = read("attention.sliding_window")
    tensors = file.tensors
    return ModelSpec(
        architecture=ARCHITECTURES[name],
        hidden_size=hidden_size,
        intermediate_size=int(need("feed_forward_length")),
        num_layers=int(need("block_count")),
        num_heads=num_heads,
        num_kv_heads=int(read("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        vocab_size=tensors["token_embd.weight"].shape[0],
        max_position=min(limit, int(window)) if window else limit,
        rms_norm_eps=float(need("attention.layer_norm_rms_epsilon")),
        rope_theta=float(read("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(file, read),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        dtype=_dtype(file),
        eos_token_ids=_eos_token_ids(file),
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
    )


def _rope_scaling(file: GGUFFile, read: Any) -> dict[str, Any]:
    """Returns RoPE's scaling. Llama 3 stores it as a tensor with a divisor per frequency."""
    kind = read("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: none, linear")
    factor = float(read("rope.scaling.factor", 1.0) if kind == "linear" else 1.0)
    if "rope_freqs.weight" in file.tensors:
        divisors = [float(value) * factor for value in file.read("rope_freqs.weight")]
        return {"rope_type": "divisors", "divisors": divisors}
    return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {}


def _dtype(file: GGUFFile) -> torch.dtype:
    """Returns float16 for quantized weights: bfloat16 would round their float16 scales."""
    return _FLOAT_DTYPES.get(file.tensors["blk.0.attn_q.weight"].type, torch.float16)


def _eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """Returns the ids that end a sequence, a turn and a message, as far as the file names them."""
    found = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(int(token_id) for token_id in found if token_id is not None))
