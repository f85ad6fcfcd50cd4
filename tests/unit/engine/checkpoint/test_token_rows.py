"""Rows of a checkpoint's embedding and head, from each kind of file."""

from pathlib import Path

import pytest
import torch

from loraplex.engine.checkpoint.token_rows import TokenRows
from loraplex.engine.errors import ConfigError

from helpers.models.gguf_files import write_gguf
from helpers.models.hf_models import make_hf_model


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", ["one file", "several files", "gguf"])
def test_rows(tmp_path: Path, kind: str, is_tied: bool) -> None:
    shard = "40KB" if kind == "several files" else "5GB"
    path = tmp_path / "base"
    model = make_hf_model("llama", path, max_shard_size=shard, tie_word_embeddings=is_tied)
    if kind == "gguf":
        path = tmp_path / "base.gguf"
        write_gguf(path, model)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    rows = TokenRows(path)
    for name, weight in (("model.embed_tokens", embedding), ("lm_head", head)):
        for tokens in (range(512), range(7, 8), range(500, 512)):
            assert torch.equal(
                rows.read(name, tokens, torch.float32), weight[tokens.start : tokens.stop]
            )
            rounded = rows.read(name, tokens, torch.bfloat16)
            assert torch.equal(rounded, weight[tokens.start : tokens.stop].bfloat16())


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        TokenRows(tmp_path)
