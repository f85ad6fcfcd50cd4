"""The contract of op ``fused``: the small operators of a decode step, each one launch.

Arithmetic is float32 and rounds to the tensors' dtype where Hugging Face's models round. Rows are
contiguous. The stride between rows is free where an argument says so. Operators allocate only the
result and never sync, and the same input gives the same bits. So every operator may be captured in
a CUDA graph.

The noise of `draw`: token id i of a row with keys (k0, k1) has, in arithmetic modulo 2^32::

    mix(x):  x = (x ^ x >> 16) * 0x45D9F3B, twice; then x ^ x >> 16
    bits   = mix(mix(i * 0x61C88647 + k0) ^ k1)
    u      = ((bits >> 9) + 0.5) * 2^-23        exact in float32, and never 0 or 1
    noise  = -log(-log(u))                      of the Gumbel distribution

Some operators also write their result in e4m3, to `fp8`: the rounded result, as `quantize_rows`
would round it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.backends.fp8 import Fp8Rows


@dataclass(frozen=True, slots=True)
class FusedSpec:
    """Values that all calls of one worker share."""

    dtype: torch.dtype  # of activations and weights
    device: torch.device
    head_dim: int  # even


class FusedOps(Protocol):
    """One backend, made once a worker with a FusedSpec. T tokens, N rows that sample."""

    name: str

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, fp8: Fp8Rows | None = None
    ) -> torch.Tensor:
        """Returns weight * x / sqrt(mean(x^2) + eps), rounded before the weight is applied.

        Args:
            x: [T, size], any row stride.
            weight: [size].
            fp8: [T, size]; written if given.

        Returns:
            [T, size], contiguous.
        """
        ...

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        fp8: Fp8Rows | None = None,
    ) -> torch.Tensor:
        """Add x to the residual, in place and rounded, and return rms_norm(residual).

        Args:
            x: [T, size], any row stride.
            residual: the same; mutated.
            fp8: [T, size]; written if given.

        Returns:
            [T, size], contiguous.
        """
        ...

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
        """Norm the heads of q and k if there are weights for it, rotate them by RoPE, and write q
        to `out` and K and V to pages.

        Args:
            qkv: [T, (num_heads + 2 * kv_heads) * head_dim], q | k | v, any row stride.
            cos_sin: float32 [T, head_dim], cos | sin of the head_dim / 2 angles; element i of a
                head turns with element i + head_dim / 2.
            kv: [num_pages, 2, block_tokens, kv_heads, head_dim], one layer of the pool,
                contiguous; mutated. Its dtype is qkv's, or e4m3: K and V are then rounded once
                more, and magnitudes above 448 become 448.
            kv_rows: int64 [T], K's row in the layer seen as rows of [kv_heads, head_dim]; V's is
                block_tokens rows later. If tokens share a row, it keeps one of them.
            out: [T, num_heads, head_dim], contiguous; mutated.
            q_norm: [head_dim] or None; k_norm alike, and both or neither.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor, fp8: Fp8Rows | None = None) -> torch.Tensor:
        """Returns silu(gate) * up. The result of silu is rounded before the product.

        Args:
            gate_up: [T, 2 * size], gate | up, any row stride.
            fp8: [T, size]; written if given.

        Returns:
            [T, size], contiguous.
        """
        ...

    def quantize_rows(self, x: torch.Tensor) -> Fp8Rows:
        """Returns x in e4m3, each row with the scale that makes its largest magnitude 448.

        Args:
            x: [T, size], any row stride.
        """
        ...

    def draw(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        *,
        mask_places: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the index of the greatest element of each row, or -1 for a row that is broken.

        The row is logits / temperature + noise (see above), or the logits where the temperature is
        0. Among equals the lowest token id wins. A row is broken if any of its logits is NaN or
        +inf, allowed or not, or if all allowed ones are -inf.

        Args:
            logits: [N, vocabulary], the model's dtype or float32, any row stride.
            temperature: float32 [N], not negative.
            keys: int64 [N, 2], 32 bits each.
            mask_places: int32 [N], the row of `masks` that restricts each row, -1 for none; None
                if there are no masks.
            masks: int32 [M, ceil(vocabulary / 32)]; bit i % 32 of word i / 32 allows token i.

        Returns:
            Token ids, int32 [N].
        """
        ...
