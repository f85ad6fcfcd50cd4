"""Backend ``torch`` of op ``fused``: PyTorch's operators. Runs anywhere."""

import torch
from torch.nn import functional

from loraplex.backends.fp8 import E4M3, Fp8Rows, quantize, rows_like, saturate
from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.masks import apply_masks

CHUNK_ELEMS = 1 << 24
"""Logits that are drawn from in one chunk, about; bounds the scratch memory."""

_MASK_32 = 0xFFFFFFFF


class TorchFused:
    name = "torch"

    @staticmethod
    def probe(spec: FusedSpec | None = None) -> str | None:
        return None

    def __init__(self, spec: FusedSpec) -> None:
        self._head_dim = spec.head_dim

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, fp8: Fp8Rows | None = None
    ) -> torch.Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        y = weight * (x32 * scale).to(x.dtype)
        if fp8 is not None:
            quantize(y, fp8)
        return y

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        fp8: Fp8Rows | None = None,
    ) -> torch.Tensor:
        return self.rms_norm(residual.add_(x), weight, eps, fp8)

    def rope_store_kv(
        self,
        *,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        kv: torch.Tensor,
        kv_rows: torch.Tensor,
        out: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        block_tokens, num_kv_heads = kv.shape[2:4]
        heads = qkv.unflatten(-1, (-1, self._head_dim))
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = self.rms_norm(q, q_norm, eps), self.rms_norm(k, k_norm, eps)
        cos, sin = cos_sin[:, None, :].chunk(2, dim=-1)
        k = _rotate(k, cos, sin)
        if kv.dtype is E4M3:  # index_copy_ takes no e4m3
            k, v, kv = (x.view(torch.uint8) for x in (saturate(k), saturate(v), kv))
        rows = kv.view(-1, num_kv_heads, self._head_dim)
        rows.index_copy_(0, kv_rows, k)
        rows[block_tokens:].index_copy_(0, kv_rows, v)
        out.copy_(_rotate(q, cos, sin))

    def silu_mul(self, gate_up: torch.Tensor, fp8: Fp8Rows | None = None) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        y = functional.silu(gate).mul_(up)
        if fp8 is not None:
            quantize(y, fp8)
        return y

    def quantize_rows(self, x: torch.Tensor) -> Fp8Rows:
        rows = rows_like(x)
        quantize(x, rows)
        return rows

    def draw(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        *,
        mask_places: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if mask_places is not None and masks is not None:
            logits = _masked(logits, mask_places, masks)
        sampled = logits.argmax(dim=-1)  # the first NaN, where there is one
        greatest = logits.gather(1, sampled[:, None])[:, 0]
        for part in _chunks(temperature > 0, logits.shape[1]):
            heat = temperature.index_select(0, part)
            values = logits.index_select(0, part).float() / heat[:, None]
            values += gumbel_noise(keys.index_select(0, part), logits.shape[1])
            greedy = sampled.index_select(0, part)
            sampled.index_copy_(0, part, torch.where(heat > 0, values.argmax(dim=-1), greedy))
        return sampled.masked_fill_(~greatest.isfinite(), -1).int()


def _masked(logits: torch.Tensor, places: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Returns the logits with -inf for the excluded tokens."""
    logits = logits.clone()
    for part in _chunks(places >= 0, logits.shape[1]):
        values = logits.index_select(0, part)
        logits.index_copy_(0, part, apply_masks(values, places.index_select(0, part), masks))
    return logits


def _chunks(wanted: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """Returns the numbers of the wanted rows, in chunks. On a GPU it returns all rows: no sync."""
    if wanted.device.type == "cpu":
        rows = wanted.nonzero()[:, 0]
    else:
        rows = torch.arange(len(wanted), device=wanted.device)
    return rows.split(max(1, CHUNK_ELEMS // vocab_size))


def gumbel_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Returns the contract's noise, float32 [R, vocab_size].

    It is equal on every device up to the rounding of log. Products of the hash stay below 2^63.

    Args:
        keys: int64 [R, 2].
    """
    ids = torch.arange(vocab_size, device=keys.device)
    bits = _mix32((ids * 0x61C88647 + keys[:, :1]) & _MASK_32)
    bits = _mix32(bits ^ keys[:, 1:])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mix32(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK_32
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK_32
    return x ^ (x >> 16)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x [T, heads, head_dim], rotated in float32 by its tokens' angles; contiguous."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
