"""Reads the weights of a GGUF file: dequantizes, renames and undoes llama.cpp's row order."""

import re
from pathlib import Path

import torch

from loraplex.engine.checkpoint.gguf_file import GGUFFile
from loraplex.engine.checkpoint.pieces import copy_pieces
from loraplex.engine.model.shard import Piece
from loraplex.engine.model.spec import ModelSpec

_CHUNK_ELEMS = 1 << 22  # elements dequantized at a time: 16 MiB of float32

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
        is_permuted = self._file.metadata["general.architecture"] == "llama"
        self._permuted = ("q_proj", "k_proj") if is_permuted else ()
        self._head_dim = spec.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tensors = self._file.tensors
        return {name: tensors[source].shape for name, source in self._names.items()}

    def copy_to(self, name: str, target: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
        shape = self._file.tensors[self._names[name]].shape
        if not pieces:
            pieces = tuple(Piece(0, size, size, size) for size in shape)
        if len(shape) == 1:
            copy_pieces(self._read(name), target, pieces)
            return
        rows, columns = pieces
        width = columns.stop - columns.start
        if width == 0:
            return  # this rank holds padding alone
        unit = self._head_dim if self._is_permuted(name) else 1  # a rank holds whole heads
        step = max(1, _CHUNK_ELEMS // width // unit) * unit
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            part = target[start - rows.start : stop - rows.start, :width]
            part.copy_(self._read(name, slice(start, stop), slice(columns.start, columns.stop)))

    def scales(self, name: str, pieces: tuple[Piece, ...]) -> None:
        return None  # blocks are dequantized as they are read

    def _read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        part = torch.from_numpy(self._file.read(self._names[name], rows, columns))
        return unpermute(part, self._head_dim) if self._is_permuted(name) else part

    def _is_permuted(self, name: str) -> bool:
        return name.split(".")[-2] in self._permuted


def hf_name(name: str) -> str:
    """Returns Hugging Face's name of a GGUF tensor, or `name` if there is none."""
    if match := _LAYER.fullmatch(name):
        layer, part, kind = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"{_NAMES[part]}.{kind}" if part in _NAMES else name


def unpermute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders the rows of a q or k projection from llama.cpp's pairs (0, 1) to halves (0, d/2).

    Args:
        weight: [n * head_dim, ...], n whole heads of a matrix or a bias.
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.swapaxes(1, 2).reshape(weight.shape)
