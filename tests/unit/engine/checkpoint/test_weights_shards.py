"""Loading the part of one worker rank: the parts of all ranks are the checkpoint again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from transformers import PreTrainedModel

from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.checkpoint.weights import load_weights
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.shard import shard_of

from helpers.models.gguf_files import write_gguf
from helpers.models.hf_models import make_hf_model

SIZES: dict[str, dict[str, Any]] = {
    "even": {"attention_bias": True, "mlp_bias": True},
    "odd": {"intermediate_size": 161, "vocab_size": 509, "tie_word_embeddings": True},
    "one-kv-head": {"num_key_value_heads": 1},
    "padding-alone": {"intermediate_size": 5, "vocab_size": 5},  # the last of 4 ranks has no rows
}


def load_ranks(path: Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    return [load_rank(path, rank, world_size) for rank in range(world_size)]


def load_rank(path: Path, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Returns the parameters of a rank. Memory that is not written to holds NaN."""
    spec = load_spec(path)
    shard = shard_of(spec, worker_rank=rank, world_size=world_size)
    model = Decoder(spec, dtype=torch.float32, device="cpu", shard=shard)
    for tensor in model.parameters().values():
        tensor.fill_(torch.nan)
    load_weights(model, path, progress=False)
    return model.parameters()


def joined(parts: list[torch.Tensor], name: str, full: torch.Tensor) -> torch.Tensor:
    """Puts the ranks' parts together again, by Megatron's rules; the padding must be zero."""
    module, kind = name.split(".")[-2:]
    if "norm" in module:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    axis = 0
    if module in ("o_proj", "down_proj"):
        if kind == "bias":
            return torch.stack(parts).sum(0)  # one rank adds it
        axis = 1
    if module in ("k_proj", "v_proj"):
        rows = sum(len(part) for part in parts)
        parts = parts[:: rows // len(full)]  # without the copies of replicated heads
    padded, size = torch.cat(parts, axis), full.shape[axis]
    padding = padded.narrow(axis, size, padded.shape[axis] - size)
    assert torch.equal(padding, torch.zeros_like(padding)), name
    return padded.narrow(axis, 0, size)


def check(ranks: list[dict[str, torch.Tensor]], model: PreTrainedModel) -> None:
    reference = model.state_dict()
    if model.config.tie_word_embeddings:
        reference.pop("lm_head.weight")
    assert ranks[0].keys() == reference.keys()
    for name, full in reference.items():
        parts = [rank[name] for rank in ranks]
        assert torch.equal(joined(parts, name, full), full), name


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sizes", SIZES)
def test_safetensors(sizes: str, world_size: int, tmp_path: Path) -> None:
    model = make_hf_model("llama", tmp_path, **SIZES[sizes])
    check(load_ranks(tmp_path, world_size), model)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sizes", SIZES)
def test_gguf(sizes: str, world_size: int, tmp_path: Path) -> None:
    model = make_hf_model("llama", tmp_path / "hf", **SIZES[sizes])
    write_gguf(tmp_path / "model.gguf", model)
    check(load_ranks(tmp_path / "model.gguf", world_size), model)


def test_a_quantized_gguf_is_cut_after_it_is_dequantized(tmp_path: Path) -> None:
    """A rank's columns may begin inside a block of 32 weights that share a scale."""
    model = make_hf_model("qwen2", tmp_path / "hf", hidden_size=96, head_dim=24)
    write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType.Q8_0)
    (whole,) = load_ranks(tmp_path / "model.gguf", 1)
    ranks = load_ranks(tmp_path / "model.gguf", 4)
    for name, full in whole.items():
        assert torch.equal(joined([rank[name] for rank in ranks], name, full), full), name


def test_a_head_that_differs_from_a_tied_embedding_is_seen_by_the_rank_that_holds_it(
    tmp_path: Path,
) -> None:
    model = make_hf_model("llama", tmp_path, tie_word_embeddings=True)
    tensors = dict(model.state_dict())
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    load_rank(tmp_path, 0, 2)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs"):
        load_rank(tmp_path, 1, 2)
