"""Rotary position embedding (arXiv 2104.09864), halves rotated as in Hugging Face checkpoints."""

import math
from typing import Any

import torch

from loraplex.engine.model.spec import ModelSpec


class RotaryEmbedding:
    """Computes the angles of a checkpoint, scaled as it declares."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.inv_freq = inverse_frequencies(spec).to(device)

    def cos_sin(self, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Write cos | sin of each token's angles; see FusedOps.rope_store_kv.

        Args:
            positions: int64 [T].
            out: float32 [T, head_dim], contiguous; mutated.
        """
        angles = positions[:, None] * self.inv_freq  # float32, where every position is exact
        halves = out.view(len(positions), 2, len(self.inv_freq))
        torch.cos(angles, out=halves[:, 0])
        torch.sin(angles, out=halves[:, 1])


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Returns the frequencies, float32 [head_dim / 2] on the CPU.

    `spec.rope_scaling` is {} or has a `rope_type`: "linear" (`factor`), "llama3" (Hugging Face's
    fields) or "divisors" (`divisors`, one for each frequency: how GGUF stores Llama 3's).
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    inv_freq = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    match scaling.get("rope_type", "default"):
        case "linear":
            return inv_freq / scaling["factor"]
        case "llama3":
            return _scale_llama3(inv_freq, scaling)
        case "divisors":
            return inv_freq / torch.tensor(scaling["divisors"], dtype=torch.float32)
        case "default":
            return inv_freq
        case other:
            raise ValueError(f"unknown rope scaling {other!r}")


def _scale_llama3(inv_freq: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Scale as Llama 3.1 does: divide slow frequencies by `factor`, keep fast ones, blend between.

    `share` is 0 for wavelengths above original / low_freq_factor and 1 below
    original / high_freq_factor.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share) * inv_freq / scaling["factor"] + share * inv_freq
