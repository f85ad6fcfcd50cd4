"""Real PEFT adapters of the token embedding and the head, and the weights that they lead to."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE
from loraplex.engine.adapters.target import AdapterTarget

from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_folders import edit_weights, make_target

HEAD, EMBEDDING = "base_model.model.lm_head.", "base_model.model.model.embed_tokens."
TOKENS = (3, 9, 500)


def target_of(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> AdapterTarget:
    """Returns the target for the tiny Llama in a folder; `changes` are of its VocabularyTarget."""
    target = make_target(dtype=dtype)
    assert target.vocabulary is not None
    sizes = dataclasses.replace(target.vocabulary, **{"base": str(path), **changes})
    return dataclasses.replace(target, vocabulary=sizes)


def make_changed_adapter(model: PreTrainedModel, folder: Path) -> Path:
    """Saves LoRA on both matrices over base weights of which the rows of TOKENS are changed."""
    targets = ["q_proj", "embed_tokens", "lm_head"]
    make_adapter(model, folder, r=4, alpha=8, targets=targets, save_embedding_layers="auto")
    change_base_rows(folder)
    return folder


def change_base_rows(folder: Path) -> None:
    """Changes the rows of TOKENS in the base weights that PEFT has saved beside LoRA."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for prefix, sign in ((EMBEDDING, 1), (HEAD, -1)):
            matrix = tensors[f"{prefix}base_layer.weight"]
            matrix[list(TOKENS)] = sign * matrix[[token - 1 for token in TOKENS]]

    edit_weights(folder, change)


def merged(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the embedding and the head of the adapter of make_changed_adapter, in float64."""
    tensors = {name: t.double() for name, t in load_file(folder / WEIGHTS_FILE).items()}
    embedding = tensors[EMBEDDING + "base_layer.weight"]
    a, b = tensors[EMBEDDING + "lora_embedding_A"], tensors[EMBEDDING + "lora_embedding_B"]
    head = tensors[HEAD + "base_layer.weight"]
    head_a, head_b = tensors[HEAD + "lora_A.weight"], tensors[HEAD + "lora_B.weight"]
    return embedding + 2 * (b @ a).t(), head + 2 * head_b @ head_a
