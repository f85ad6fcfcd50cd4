"""The host memory that a rank takes while it loads its part of a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.model.decoder import Decoder

from helpers.models.dummy_models import LLAMA_3_8B, write_config
from helpers.models.gguf_files import write_gguf

TESTS = Path(__file__).parents[3]
MIB = 1 << 20
RANKS = [pytest.param(0, marks=pytest.mark.long), 1]
SLACK = 48 * MIB  # three stretches of 16 MiB, in which a GGUF file is dequantized
SIZES: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32_000,
}  # fmt: skip


def memory_of(path: Path, rank: int) -> dict[str, int]:
    """Returns what helpers/running/load_memory.py prints of one of two ranks."""
    command = [sys.executable, "-P", "-m", "helpers.running.load_memory", str(path), str(rank), "2"]
    environment = {"PYTHONPATH": ":".join([str(TESTS), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_reads_its_shard_of_a_tied_checkpoint(rank: int, tmp_path: Path) -> None:
    """The file holds an equal head beside the tied embedding, which the rank has to compare."""
    write_config(tmp_path, LLAMA_3_8B | SIZES | {"tie_word_embeddings": True})
    model = Decoder(load_spec(tmp_path), dtype=torch.bfloat16, device="meta")
    weights = {name: torch.ones(tensor.shape, dtype=tensor.dtype)
               for name, tensor in model.parameters().items()}  # fmt: skip
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in weights.values())
    vocabulary = weights["lm_head.weight"].nbytes
    memory = memory_of(tmp_path, rank)
    print({name: round(size / MIB) for name, size in (memory | {"whole": whole}).items()})
    assert whole > 180 * MIB and memory["shard"] < 0.51 * (whole - vocabulary)
    assert memory["anonymous"] < memory["shard"] + SLACK
    # Pages of o and down hold columns of both ranks.
    assert memory["mapped"] < whole - vocabulary + SLACK // 4


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_dequantizes_its_shard_of_a_gguf_file(rank: int, tmp_path: Path) -> None:
    sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": 512,
                     "hidden_size": 2048, "num_attention_heads": 64, "head_dim": 128}  # fmt: skip
    config = LlamaConfig(**sizes, dtype="float16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(1.0)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, GGMLQuantizationType.F16)
    memory = memory_of(path, rank)
    print({name: round(size / MIB) for name, size in memory.items()})
    assert memory["anonymous"] < memory["shard"] + SLACK
