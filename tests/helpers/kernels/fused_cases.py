"""The oracles of op ``fused``: plain loops in float64, one row and one head at a time."""

import numpy as np
import torch

_MASK_32 = np.uint64(0xFFFFFFFF)


def make_fused(name: str, dtype: torch.dtype, device: str, head_dim: int = 64):
    """Returns (the op, None), or (None, the reason why it cannot run here)."""
    from loraplex.backends import registry
    from loraplex.backends.fused.contract import FusedSpec

    spec = FusedSpec(dtype=dtype, device=torch.device(device), head_dim=head_dim)
    backend = next(b for b in registry.list_backends("fused") if b.name == name)
    reason = backend.probe(spec)
    return (None, f"{name}: {reason}") if reason else (backend.make(spec), None)


def rms_norm_oracle(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns the expected norm of [T, size], in float64, never rounded."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for row, values in enumerate(x.double()):
        out[row] = values / (values.square().sum() / len(values) + eps).sqrt() * weight.double()
    return out


def rope_oracle(
    heads: torch.Tensor, angles: torch.Tensor, norm: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Returns the expected [T, heads, head_dim], in float64: element i turns with i + head_dim / 2.

    Args:
        angles: float64 [T, head_dim / 2].
    """
    out = torch.empty(heads.shape, dtype=torch.float64)
    half = heads.shape[2] // 2
    for token in range(heads.shape[0]):
        values = heads[token].double()
        if norm is not None:
            values = rms_norm_oracle(values, norm, eps)
        for i in range(half):
            turn = complex(angles[token, i].cos(), angles[token, i].sin())
            pairs = torch.complex(values[:, i], values[:, i + half]) * turn
            out[token, :, i], out[token, :, i + half] = pairs.real, pairs.imag
    return out


def draw_values(logits: torch.Tensor, temperature: float, keys: list[int]) -> np.ndarray:
    """Returns the values that one row's draw compares, float64 [vocabulary]."""
    values = logits.double().numpy()
    if temperature == 0:
        return values
    ids = np.arange(len(values), dtype=np.uint64)
    bits = _mix((ids * np.uint64(0x61C88647) + np.uint64(keys[0])) & _MASK_32)
    bits = _mix(bits ^ np.uint64(keys[1]))
    uniform = ((bits >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23
    return values / float(np.float32(temperature)) - np.log(-np.log(uniform))


def _mix(x: np.ndarray) -> np.ndarray:
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)) & _MASK_32
    return x ^ (x >> np.uint64(16))
