"""Folders of PEFT adapters, and the changes that tests make to their files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE
from loraplex.engine.adapters.target import AdapterTarget, VocabularyTarget
from loraplex.engine.model.shard import Piece, whole_modules
from loraplex.memory.adapter_layout import ModuleShape

CONFIG_FILE = "adapter_config.json"
SHAPES = (
    ModuleShape(64, 64), ModuleShape(64, 32), ModuleShape(64, 32), ModuleShape(64, 64),
    ModuleShape(64, 160), ModuleShape(64, 160), ModuleShape(160, 64),
)  # fmt: skip
BLOCK_TOKENS = 16
PAGE_ELEMS = BLOCK_TOKENS * 2 * 2 * 16
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
"""Name of a tensor of the first q_proj, without its side, A or B."""


def make_target(**overrides: Any) -> AdapterTarget:
    """Returns the target for the tiny Llama of hf_models."""
    values = {
        "num_layers": 3,
        "modules": whole_modules(SHAPES),
        "page_elems": PAGE_ELEMS,
        "dtype": torch.float32,
        "max_rank": 64,
        "vocabulary": VocabularyTarget(
            Piece(0, 512, 512, 512), hidden_size=64, is_tied=False, max_rows=8
        ),
    }
    return AdapterTarget(**{**values, **overrides})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_FILE,
    )
