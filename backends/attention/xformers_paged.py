"""Backend ``xformers`` of op ``attention``: xformers.ops.fmha over the page pool.

It picks these operators of xformers 0.0.35:

- ``flash3``, if the module flash_attn_3 can be imported: decode and prefill, over pages.
- ``triton_splitk``: decode over pages of a multiple of 64 tokens. It refuses causal queries
  longer than 16 or of mixed lengths, so prefill never uses it.
- Otherwise (prefill without flash3, decode over smaller pages, fp32) K and V are gathered to
  contiguous rows, and xformers' own dispatch picks a kernel for a block-diagonal causal mask.

The paged operators need one uniform token stride. A page holds `block_tokens` rows of K, then as
many of V. Seen as pages of `block_tokens` rows, page p's K is number 2 p, and V is the same buffer
starting `block_tokens` rows later.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loraplex.backends.attention.contract import (
    AttentionBatch,
    AttentionSpec,
    GraphsUnsupportedError,
)
from loraplex.backends.attention.self_test import self_test, self_test_spec
from loraplex.backends.launch.upload import Uploader

SPARE_TOKENS = 512
"""FlashAttention 3 fetches a tile's page numbers past a sequence's end, so each row of the table
ends with valid pages for this many tokens."""
MAX_GATHER_TOKENS = 1 << 17
"""Bounds the K and V that one call gathers. A longer sequence gets its own call."""
SPLITK_PAGE_TOKENS = 64
SPLITK_HEAD_DIMS = (16, 32, 64, 128, 256, 512)
HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Part:
    """Consecutive sequences that one call serves."""

    tokens: slice  # rows of q and out
    bias: Any  # fmha.attn_bias
    operator: Any | None  # None: xformers' dispatch decides
    kv_rows: torch.Tensor | None  # int64, the rows to gather; None: read over pages


@dataclass(frozen=True, slots=True)
class XFormersPlan:
    parts: list[_Part]


class XFormersAttention:
    name = "xformers"
    supports_graphs = False

    def __init__(self, spec: AttentionSpec) -> None:
        from xformers.ops import fmha

        self._fmha: Any = fmha
        self._spec = spec
        self._uploader = Uploader(spec.device)
        has_flash3 = _flash3_reason(spec) is None
        self._prefill_operator = fmha.flash3.FwOp if has_flash3 else None
        self._decode_operator = fmha.flash3.FwOp_KVSplit if has_flash3 else None
        if not has_flash3 and _splitk_reason(spec) is None:
            self._decode_operator = fmha.triton_splitk.FwOp

    @classmethod
    def probe(cls, spec: AttentionSpec | None = None) -> str | None:
        is_cuda = torch.cuda.is_available() if spec is None else spec.device.type == "cuda"
        if not is_cuda:
            return "it needs a CUDA GPU"
        reason = _library_reason()
        if reason is not None or spec is None:
            return reason
        if spec.page_dtype is not spec.dtype:
            return f"it reads pages of q's dtype, not {spec.page_dtype}: set --kv-cache-dtype auto"
        if spec.head_dim % 8 or spec.head_dim > 256:
            return f"head_dim {spec.head_dim} must be a multiple of 8 and at most 256"
        try:
            return self_test(cls(self_test_spec(spec)), spec)
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            return f"its self-test failed: {str(error).strip()[:500]}"

    def plan(self, batch: AttentionBatch) -> XFormersPlan:
        decodes, total = batch.num_decodes, len(batch.query_lens)
        parts: list[_Part] = []
        for start, end, operator in (
            (0, decodes, self._decode_operator),
            (decodes, total, self._prefill_operator),
        ):
            if start == end:
                continue
            if operator is not None:
                parts.append(self._plan_paged(batch, start, end, operator))
            else:
                parts += self._plan_gathered(batch, start, end)
        return XFormersPlan(parts)

    def plan_graph(self, batch: AttentionBatch, num_rows: int) -> XFormersPlan:
        raise GraphsUnsupportedError(self.name)

    def run(
        self, plan: XFormersPlan, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor
    ) -> None:
        block, group = self._spec.block_tokens, self._spec.num_heads // self._spec.num_kv_heads
        rows = kv.view(-1, *kv.shape[3:])
        num_shared = rows.shape[0] - block
        for part in plan.parts:
            if part.kv_rows is None:
                k, v = rows[:num_shared], rows[block:]
            else:
                k = rows.index_select(0, part.kv_rows)
                v = rows[block:].index_select(0, part.kv_rows)
            query = q[part.tokens][None]
            key, value = k[None], v[None]
            if group > 1 and q.dtype in HALF_DTYPES:
                # [1, rows, kv heads, heads of the group, head_dim], the group by a zero stride
                query = query.unflatten(2, (self._spec.num_kv_heads, group))
                key, value = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (key, value))
            elif group > 1:
                key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
            answer = self._fmha.memory_efficient_attention_forward(
                query, key, value, part.bias, scale=self._spec.scale, op=part.operator
            )
            out[part.tokens].copy_(answer.reshape(q[part.tokens].shape))

    def _plan_paged(self, batch: AttentionBatch, start: int, end: int, operator: Any) -> _Part:
        block = self._spec.block_tokens
        kv_lens = batch.kv_lens[start:end]
        counts = -(-kv_lens // block)
        num_pages = int(counts.max())
        pages = batch.page_table[start:end, :num_pages]
        table = np.zeros((end - start, num_pages + -(-SPARE_TOKENS // block)), dtype=np.int32)
        # The operators fetch pages past a sequence's end: give them page 0, never a stale number.
        table[:, :num_pages] = np.where(np.arange(num_pages) < counts[:, None], 2 * pages, 0)
        biases = self._fmha.attn_bias
        bias_class = biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        if start < batch.num_decodes:  # one query sees all keys: no causal mask needed
            bias_class = biases.PagedBlockDiagonalPaddedKeysMask
        bias = bias_class.from_seqlens(
            q_seqlen=batch.query_lens[start:end].tolist(),
            kv_seqlen=kv_lens.tolist(),
            block_tables=self._uploader.upload({"table": table})["table"],
            page_size=block,
            device=self._spec.device,
        )
        first = int(batch.query_lens[:start].sum())
        tokens = slice(first, first + int(batch.query_lens[start:end].sum()))
        return _Part(tokens, bias, operator, kv_rows=None)

    def _plan_gathered(self, batch: AttentionBatch, start: int, end: int) -> list[_Part]:
        parts, first_token = [], int(batch.query_lens[:start].sum())
        while start < end:
            stop, num_tokens = start, 0
            while stop < end and (
                stop == start or num_tokens + batch.kv_lens[stop] <= MAX_GATHER_TOKENS
            ):
                num_tokens += int(batch.kv_lens[stop])
                stop += 1
            query_lens = batch.query_lens[start:stop].tolist()
            bias = self._fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
                q_seqlen=query_lens,
                kv_seqlen=batch.kv_lens[start:stop].tolist(),
                device=self._spec.device,
            )
            tokens = slice(first_token, first_token + sum(query_lens))
            rows = self._rows_of(batch, start, stop)
            parts.append(_Part(tokens, bias, None, rows))
            start, first_token = stop, tokens.stop
        return parts

    def _rows_of(self, batch: AttentionBatch, start: int, stop: int) -> torch.Tensor:
        """Returns the row of each position's K in a layer seen as rows, sequence by sequence, int64
        [sum of kv_lens]."""
        block = self._spec.block_tokens
        lens = batch.kv_lens[start:stop].astype(np.int64)
        sequence = np.repeat(np.arange(stop - start), lens)
        position = np.arange(len(sequence)) - (lens.cumsum() - lens)[sequence]
        pages = batch.page_table[start:stop][sequence, position // block].astype(np.int64)
        rows = pages * (2 * block) + position % block
        return self._uploader.upload({"rows": rows})["rows"]


def _library_reason() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install xformers)"
    try:
        from xformers import _cpp_lib
        from xformers.ops import fmha  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"xformers does not import: {error}"
    if not getattr(_cpp_lib, "_built_with_cuda", True):
        cause = str(getattr(_cpp_lib, "_cpp_library_load_exception", None) or "").splitlines()
        return (
            "xformers' CUDA extension does not load: install nvidia-cuda-runtime-cu12 and put its "
            f"nvidia/cuda_runtime/lib on LD_LIBRARY_PATH ({cause[0] if cause else 'no details'})"
        )
    return None


def _flash3_reason(spec: AttentionSpec) -> str | None:
    from xformers.ops import fmha

    if getattr(fmha.flash3, "_C_flashattention3", None) is None:
        return "flash_attn_3 is not installed"
    if torch.cuda.get_device_capability(spec.device)[0] not in (8, 9):
        return "flash3 runs on compute capability 8 and 9"
    if spec.dtype not in HALF_DTYPES or not 32 <= spec.head_dim <= 256:
        return "flash3 takes fp16 and bf16 and head_dim 32 to 256"
    return None


def _splitk_reason(spec: AttentionSpec) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if spec.block_tokens % SPLITK_PAGE_TOKENS:
        return f"triton_splitk needs pages of a multiple of {SPLITK_PAGE_TOKENS} tokens"
    if spec.dtype not in HALF_DTYPES or spec.head_dim not in SPLITK_HEAD_DIMS:
        return f"triton_splitk takes fp16 and bf16 and head_dim {SPLITK_HEAD_DIMS}"
    return None
