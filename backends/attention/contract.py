"""The contract of op ``attention``: paged, causal, grouped-query attention over the pool.

A layer of the pool is [num_pages, 2, block_tokens, num_kv_heads, head_dim]: each page holds
`block_tokens` rows of K, then as many of V. Position p of a sequence lies in page
`page_table[b, p // block_tokens]` at row `p % block_tokens`.

Semantics: query token i (0-based) of sequence b stands at position
`kv_lens[b] - query_lens[b] + i` and sees positions 0 to its own, all already written::

    out[t, h] = softmax(scale * q[t, h] @ K[: pos + 1, h // group].T) @ V[: pos + 1, h // group]
"""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Static sizes, on one worker."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    scale: float
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The sequences of a step, B of them with T query tokens in all; decode rows come first."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]  # context length once this step's K and V are written
    num_decodes: int  # the first rows, each with one query token
    query_starts: torch.Tensor  # int32 [B + 1] on the device
    kv_lens_device: torch.Tensor  # int32 [B]
    page_table: torch.Tensor  # int32 [B, >= pages of the longest]; unused entries are page 0
    kv_rows: torch.Tensor
    """int64 [T]: where each token's K goes in the layer seen as [num_pages * 2 * block_tokens,
    num_kv_heads, head_dim]; its V goes block_tokens rows later."""


class AttentionOp(Protocol):
    """One backend, made once a worker with an AttentionSpec."""

    name: str

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare what all layers of the step share."""
        ...

    def run(self, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor) -> None:
        """Attend for one layer of the planned batch.

        Args:
            q: [T, num_heads, head_dim].
            kv: [num_pages, 2, block_tokens, num_kv_heads, head_dim], this layer of the pool.
            out: [T, num_heads, head_dim]; written.
        """
        ...
