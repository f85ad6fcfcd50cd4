"""Reads the weights of a GGUF file: dequantizes, renames and undoes llama.cpp's row order."""

import math
import re
from pathlib import Path

import torch

from loraplex.engine.checkpoint.gguf_file import GGUFFile
from loraplex.engine.checkpoint.pieces import copy_pieces
from loraplex.engine.model.shard import Piece
from loraplex.engine.model.spec import ModelSpec

_CHUNK_ELEMS = 1 << 24  # elements dequantized at a time: 64 MiB of float32

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"  # the spec holds it


class GGUFSource:
    """Implements WeightSource for a GGUF file."""

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self._file = GGUFFile(path)
        self._names = {hf_name(name): name for name in self._file.tensors if name != _ROPE_FREQS}
        # llama.cpp stores only the architecture llama in its interleaved RoPE order.
        self._permuted_heads = (
            {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
            if self._file.metadata["general.architecture"] == "llama"
            else {}
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tensors = self._file.tensors
        return {name: tensors[source].shape for name, source in self._names.items()}

    def copy_to(self, name: str, target: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
        source = self._names[name]
        shape = self._file.tensors[source].shape
        if not pieces:
            pieces = tuple(Piece(0, size, size, size) for size in shape)
        num_heads = self._permuted_heads.get(name.split(".")[-2])
        if num_heads is not None:
            weight = torch.from_numpy(self._file.read(source))
            copy_pieces(unpermute(weight, num_heads), target, pieces)
            return
        if len(shape) == 1:
            copy_pieces(torch.from_numpy(self._file.read(source)), target, pieces)
            return
        rows, columns = pieces
        step = max(1, _CHUNK_ELEMS // math.prod(shape[1:]))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            part = torch.from_numpy(self._file.read(source, start, stop))
            part = part[:, columns.start : columns.stop]
            first = start - rows.start
            target[first : first + len(part), : part.shape[1]].copy_(part)


def hf_name(name: str) -> str:
    """Returns Hugging Face's name of a GGUF tensor, or `name` if there is none."""
    if match := _LAYER.fullmatch(name):
        layer, part, kind = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"{_NAMES[part]}.{kind}" if part in _NAMES else name


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorders the rows of a q or k projection from llama.cpp's pairs (0, 1) to halves (0, d/2).

    Args:
        weight: [num_heads * head_dim, ...], a matrix or a bias.
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.swapaxes(1, 2).reshape(weight.shape)
