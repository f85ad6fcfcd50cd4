"""The contract of op ``attention``: paged, causal, grouped-query attention over the pool.

A layer of the pool is [num_pages, 2, block_tokens, num_kv_heads, head_dim]: each page holds
`block_tokens` rows of K, then as many of V. Position p of a sequence lies in page
`page_table[b, p // block_tokens]` at row `p % block_tokens`.

Semantics: query token i (0-based) of sequence b stands at position
`kv_lens[b] - query_lens[b] + i` and sees positions 0 to its own, all already written::

    out[t, h] = softmax(scale * q[t, h] @ K[: pos + 1, h // group].T) @ V[: pos + 1, h // group]

K and V are in q's dtype, or in e4m3 without scales: the numbers in pages are those that count.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Static sizes of one worker. Backends size their buffers by the last three."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    max_num_seqs: int
    max_num_tokens: int  # rows of the largest step
    max_pages: int  # of the longest sequence
    kv_dtype: torch.dtype | None = None  # of K and V in pages; None: `dtype`

    @property
    def page_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The B sequences of a step. Built once a step, on the CPU."""

    query_lens: Int32Array  # [B]
    kv_lens: Int32Array  # [B], context length once this step's K and V are written, at least 1
    num_decodes: int  # the first rows, each with one query token
    page_table: Int32Array
    """[B, >= pages of the longest]. Entries beyond a sequence's pages may be stale. A backend must
    not let its library read through them."""


def one_row_a_token(batch: AttentionBatch) -> AttentionBatch:
    """Returns the same batch with each query token as a decode row, in the same order.

    A row of q tokens becomes q rows with the same pages. All K and V are written before attention
    runs, so each of them sees what its token saw before.
    """
    if batch.num_decodes == len(batch.query_lens):
        return batch
    lens = batch.query_lens
    row = np.repeat(np.arange(len(lens)), lens)
    to_end = np.cumsum(lens)[row] - 1 - np.arange(len(row))
    return AttentionBatch(
        query_lens=np.ones(len(row), dtype=np.int32),
        kv_lens=(batch.kv_lens[row] - to_end).astype(np.int32),
        num_decodes=len(row),
        page_table=batch.page_table[row],
    )


class AttentionPlan(Protocol):
    """A batch prepared by one op. Only that op reads what it holds."""


Plan = TypeVar("Plan")


class AttentionOp(Protocol[Plan]):
    """One backend, made once a worker with an AttentionSpec.

    The op keeps nothing of a batch: a plan holds it. Plans upload without a sync. Plans, runs and
    replays of graphs are on one stream.

    Lifetime of plans:

    - A plan of `plan` owns its device memory until it is dropped. Any number may be alive, and
      they may run in any order.
    - A plan of `plan_graph` refers to static buffers of the op, which its graphs read. The next
      `plan_graph` overwrites them in stream order, so one graph plan is alive at a time.

    Attributes:
        supports_graphs: whether `plan_graph` may be called.
    """

    name: str
    supports_graphs: bool

    def plan(self, batch: AttentionBatch) -> Plan:
        """Prepare what all layers of an eager step share: decodes, prefills or both."""
        ...

    def plan_graph(self, batch: AttentionBatch, num_rows: int) -> Plan:
        """Prepare a step of decodes alone, which the op pads to `num_rows` rows.

        `run` of this plan may be captured in a CUDA graph, once for each `num_rows`. That graph
        may be replayed after each later call with the same `num_rows`. Padded rows read page 0 at
        most. What they leave in `out` is unspecified, but finite if page 0 is.

        Raises:
            ValueError: more sequences than rows, more rows than max_num_seqs, or a prefill.
            GraphsUnsupportedError: `supports_graphs` is False.
        """
        ...

    def run(self, plan: Plan, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor) -> None:
        """Attend for one layer of the planned batch.

        Args:
            q: [T, num_heads, head_dim], T the batch's tokens, or num_rows of a graph plan;
                rows may be strided.
            kv: [num_pages, 2, block_tokens, num_kv_heads, head_dim], this layer of the pool.
            out: [T, num_heads, head_dim], contiguous; written.
        """
        ...


class GraphsUnsupportedError(ValueError):
    """Raised by `plan_graph` of a backend whose launches depend on the batch."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"attention backend {name!r} cannot run in CUDA graphs: run its steps eagerly"
        )
