"""A tiny Llama of transformers, and an adapter that PEFT saved for it."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return make_hf_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(hf_model: PreTrainedModel, tmp_path: Path) -> Path:
    return make_adapter(
        hf_model, tmp_path / "adapter", r=4, alpha=8, targets=["q_proj", "down_proj"]
    )
