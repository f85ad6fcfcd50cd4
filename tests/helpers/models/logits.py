"""Logits of the decoder without an engine around it."""

from pathlib import Path

import torch

from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.checkpoint.weights import load_weights
from loraplex.engine.model.decoder import Decoder

from helpers.kernels.naive_attention import PagedSequences


def load_decoder(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Reads a model folder or a GGUF file; the decoder is on the CPU."""
    model = Decoder(load_spec(path), dtype=dtype, device="cpu")
    load_weights(model, path, progress=False)
    return model


@torch.inference_mode()
def prompt_logits(
    model: Decoder, prompts: list[torch.Tensor], chunk: int = 1000
) -> list[torch.Tensor]:
    """Returns the logits at every position of each prompt: float32 [len(prompt), vocabulary].

    Each step feeds at most `chunk` tokens of each prompt.
    """
    sequences = PagedSequences(model.spec, len(prompts), max(map(len, prompts)), model.dtype)
    done, parts = [0] * len(prompts), [[] for _ in prompts]
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        counts = [min(chunk, len(p) - at) for at, p in zip(done, prompts, strict=True)]
        tokens = torch.cat([p[at : at + n] for p, at, n in zip(prompts, done, counts, strict=True)])
        hidden = model.forward(tokens, sequences.context(done, counts))
        for part, rows in zip(parts, model.logits(hidden).split(counts), strict=True):
            part.append(rows)
        done = [at + n for at, n in zip(done, counts, strict=True)]
    return [torch.cat(part) for part in parts]
