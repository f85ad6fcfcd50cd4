"""Writes GGUF files for tests: a Hugging Face model's weights in llama.cpp's order, a tokenizer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

_ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def _interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Interleaves the halves of each head, as llama.cpp stores them: row i of each in turn."""
    rows = []
    for head in np.split(weight, num_heads):
        half = len(head) // 2
        for i in range(half):
            rows += [head[i], head[half + i]]
    return np.stack(rows)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    rope_divisors: np.ndarray | None = None,
    **metadata: Any,
) -> None:
    """Write a model of one of the supported architectures.

    Args:
        quantization: of the matrices; vectors stay float32.
        rope_divisors: float32 [head_dim / 2], stored as `rope_freqs.weight`.
        metadata: more keys, `__` for a dot; a value of None drops a key.
    """
    config = model.config
    arch = _ARCH[config.model_type]
    keys: dict[str, Any] = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.eos_token_id": 2,
    }
    if getattr(config, "head_dim", None):
        keys[f"{arch}.attention.key_length"] = config.head_dim
    keys.update({name.replace("__", "."): value for name, value in metadata.items()})
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", arch))
    for key, value in keys.items():
        _add(writer, key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.to(torch.float32).numpy()
        if arch == "llama" and ".q_proj." in name:
            array = _interleave(array, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            array = _interleave(array, config.num_key_value_heads)
        kind = quantization if array.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors)
    _finish(writer)


def write_tokenizer_gguf(path: Path, **keys: Any) -> None:
    """Write a GGUF file with `tokenizer.ggml` keys and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    _finish(writer)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
