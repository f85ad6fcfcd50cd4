"""Models whose vocabulary was resized, and adapters that PEFT has saved of them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.models.peft_adapters import make_adapter


def resized(base: Path, num_tokens: int) -> PreTrainedModel:
    """Returns the model in a folder with another number of tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model.eval()


def make_resized_adapter(
    base: Path, folder: Path, num_tokens: int, *, seed: int = 0, **options: Any
) -> Path:
    """Saves an adapter of the model in `base` after its vocabulary was resized.

    The rows of added tokens are random, and larger than the base's: the model often picks them.
    `options` are those of make_adapter.
    """
    model = resized(base, num_tokens)
    num_base = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    matrices = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    with torch.no_grad():
        for matrix in matrices:
            rows = matrix[num_base:]
            noise = torch.randn(rows.shape, generator=generator)
            rows.copy_(1.5 * matrix[:num_base].std() * noise)
    saving = {"save_embedding_layers": True, **options}
    return make_adapter(model, folder, seed=seed, **saving)
