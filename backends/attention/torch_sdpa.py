"""Backend ``torch`` of op ``attention``: SDPA over K and V gathered from the pages. Runs anywhere.

Query heads that share a KV head are folded into the query axis, so K and V are never repeated.
A padded position points at the sequence's last row, so unwritten memory is never read. K and V in
e4m3 are converted to q's dtype once they are gathered.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from loraplex.backends.attention.contract import (
    AttentionBatch,
    AttentionSpec,
    GraphsUnsupportedError,
    Int32Array,
)
from loraplex.backends.launch.upload import Uploader

MAX_GATHER_ELEMS = 1 << 25
"""Bounds the K, and the V, gathered for one call of SDPA. A longer sequence gets its own call."""
QUERY_CHUNK = 256
"""Queries of a prefill in one call, with one mask and one range of keys."""


@dataclass(frozen=True, slots=True)
class _DecodePart:
    """n sequences that decode in one call, padded to the longest, L."""

    sequences: torch.Tensor  # int64 [n], which rows of q and out
    kv_rows: torch.Tensor  # int64 [n * L]
    mask: torch.Tensor | None  # bool [n, 1, 1, L], False where padded; None: no padding


@dataclass(frozen=True, slots=True)
class _Prefill:
    query_start: int
    query_len: int
    kv_len: int
    kv_rows: torch.Tensor  # int64 [kv_len]


@dataclass(frozen=True, slots=True)
class TorchAttentionPlan:
    decodes: list[_DecodePart]
    prefills: list[_Prefill]


class TorchAttention:
    name = "torch"
    supports_graphs = False

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._uploader = Uploader(spec.device)

    @classmethod
    def probe(cls, spec: AttentionSpec | None = None) -> str | None:
        return None

    def plan(self, batch: AttentionBatch) -> TorchAttentionPlan:
        parts = self._split_decodes(batch)
        device_arrays = self._uploader.upload(
            {
                "page_table": np.ascontiguousarray(batch.page_table),
                "kv_lens": np.ascontiguousarray(batch.kv_lens),
                **{f"part{i}": np.array(part, dtype=np.int64) for i, part in enumerate(parts)},
            }
        )
        page_table, kv_lens = device_arrays["page_table"], device_arrays["kv_lens"]
        decodes = [
            self._plan_decode(batch.kv_lens[part], device_arrays[f"part{i}"], page_table, kv_lens)
            for i, part in enumerate(parts)
        ]
        prefills = []
        start = batch.num_decodes
        for index in range(batch.num_decodes, len(batch.query_lens)):
            query_len, kv_len = int(batch.query_lens[index]), int(batch.kv_lens[index])
            positions = torch.arange(kv_len, device=self._spec.device)[None]
            rows = self._rows_of(page_table[index : index + 1], positions)
            prefills.append(_Prefill(start, query_len, kv_len, rows))
            start += query_len
        return TorchAttentionPlan(decodes, prefills)

    def plan_graph(self, batch: AttentionBatch, num_rows: int) -> TorchAttentionPlan:
        raise GraphsUnsupportedError(self.name)

    def run(
        self, plan: TorchAttentionPlan, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor
    ) -> None:
        k_rows = kv.view(-1, *kv.shape[3:])
        v_rows = k_rows[self._spec.block_tokens :]
        for part in plan.decodes:
            self._run_decode(part, q, k_rows, v_rows, out)
        for prefill in plan.prefills:
            self._run_prefill(prefill, q, k_rows, v_rows, out)

    def _split_decodes(self, batch: AttentionBatch) -> list[list[int]]:
        """Group sequences of similar length, as many a call as MAX_GATHER_ELEMS allows."""
        per_token = self._spec.num_kv_heads * self._spec.head_dim
        parts: list[list[int]] = []
        # Longest first: the others of a part are padded to its first sequence.
        for index in np.argsort(-batch.kv_lens[: batch.num_decodes], kind="stable").tolist():
            if parts:
                longest = int(batch.kv_lens[parts[-1][0]])
                if (len(parts[-1]) + 1) * longest * per_token <= MAX_GATHER_ELEMS:
                    parts[-1].append(index)
                    continue
            parts.append([index])
        return parts

    def _plan_decode(
        self,
        host_lens: Int32Array,
        sequences: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
    ) -> _DecodePart:
        """Plan one call. `host_lens` are the lengths of `sequences` on the CPU, longest first."""
        longest, shortest = int(host_lens[0]), int(host_lens[-1])
        column = torch.arange(longest, device=self._spec.device)[None]
        lens = kv_lens.index_select(0, sequences).long()[:, None]
        pages = page_table.index_select(0, sequences)
        rows = self._rows_of(pages, torch.minimum(column, lens - 1))
        mask = None if shortest == longest else (column < lens)[:, None, None, :]
        return _DecodePart(sequences, rows, mask)

    def _rows_of(self, page_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns the rows of K in a layer seen as rows, int64 [n * L].

        Args:
            page_table: int32 [n, pages].
            positions: int64 [n, L].
        """
        block = self._spec.block_tokens
        pages = page_table.long().gather(1, positions // block)
        return (pages * (2 * block) + positions % block).view(-1)

    def _run_decode(
        self,
        part: _DecodePart,
        q: torch.Tensor,
        k_rows: torch.Tensor,
        v_rows: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        spec, num = self._spec, part.sequences.shape[0]
        query = q.index_select(0, part.sequences)
        answer = functional.scaled_dot_product_attention(
            query.view(num, spec.num_kv_heads, -1, spec.head_dim),
            _gather(k_rows, part.kv_rows, num, query.dtype),
            _gather(v_rows, part.kv_rows, num, query.dtype),
            attn_mask=part.mask,
            scale=spec.scale,
        )
        out.index_copy_(0, part.sequences, answer.reshape(query.shape))

    def _run_prefill(
        self,
        prefill: _Prefill,
        q: torch.Tensor,
        k_rows: torch.Tensor,
        v_rows: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        spec = self._spec
        k, v = (_gather(rows, prefill.kv_rows, 1, q.dtype) for rows in (k_rows, v_rows))
        num_cached = prefill.kv_len - prefill.query_len
        for first in range(0, prefill.query_len, QUERY_CHUNK):
            last = min(first + QUERY_CHUNK, prefill.query_len)
            num_keys = num_cached + last
            rows = slice(prefill.query_start + first, prefill.query_start + last)
            query = q[rows].view(last - first, spec.num_kv_heads, -1, spec.head_dim)
            group = query.shape[2]
            positions = torch.arange(num_cached + first, num_keys, device=q.device)
            mask = torch.arange(num_keys, device=q.device) <= positions[:, None]
            answer = functional.scaled_dot_product_attention(
                query.transpose(0, 1).flatten(1, 2)[None],
                k[:, :, :num_keys],
                v[:, :, :num_keys],
                attn_mask=mask.repeat_interleave(group, dim=0),
                scale=spec.scale,
            )
            folded = answer[0].unflatten(1, (last - first, group))
            out[rows] = folded.transpose(0, 1).reshape(last - first, -1, spec.head_dim)


def _gather(
    rows: torch.Tensor, index: torch.Tensor, num_sequences: int, dtype: torch.dtype
) -> torch.Tensor:
    """[all rows, kv_heads, head_dim] to [num_sequences, kv_heads, L, head_dim] of `dtype`."""
    if rows.dtype is dtype:
        found = rows.index_select(0, index)
    else:  # not every device's index_select takes e4m3
        found = rows.view(torch.uint8).index_select(0, index).view(rows.dtype).to(dtype)
    return found.view(num_sequences, -1, *rows.shape[1:]).transpose(1, 2)
