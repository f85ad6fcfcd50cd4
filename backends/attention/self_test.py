"""A tiny batch that an attention backend must answer correctly before it is called usable."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from loraplex.backends.attention.contract import (
    AttentionBatch,
    AttentionOp,
    AttentionSpec,
    Int32Array,
)

NUM_PAGES = 8


def self_test_spec(spec: AttentionSpec) -> AttentionSpec:
    """Returns `spec` with the smallest limits that `self_test` needs, so that it takes little
    memory."""
    return replace(spec, max_num_seqs=4, max_num_tokens=16, max_pages=4)


def self_test(op: AttentionOp[Any], spec: AttentionSpec) -> str | None:
    """Returns what is wrong with the op's answers, or None.

    V is all ones, so every answer must be one.

    Args:
        op: made with `self_test_spec(spec)`.
    """
    block, device = spec.block_tokens, spec.device
    shape = (NUM_PAGES, 2, block, spec.num_kv_heads, spec.head_dim)
    kv = torch.ones(shape, device=device).to(spec.page_dtype)
    mixed = AttentionBatch(
        query_lens=np.array([1, 1, 3], dtype=np.int32),
        kv_lens=np.array([block + 1, 1, block + 3], dtype=np.int32),
        num_decodes=2,
        page_table=_page_table(block + 3, block),
    )
    is_right = _gives_ones(op, op.plan(mixed), spec, kv, 5)
    if op.supports_graphs:
        decodes = replace(
            mixed, query_lens=mixed.query_lens[:2], kv_lens=mixed.kv_lens[:2],
            page_table=mixed.page_table[:2],
        )  # fmt: skip
        plan = op.plan_graph(decodes, 4)
        is_right = is_right and _gives_ones(op, plan, spec, kv, 4)
    return None if is_right else "its self-test gave wrong results"


def _page_table(longest: int, block_tokens: int) -> Int32Array:
    columns = -(-longest // block_tokens)
    return np.arange(3 * columns, dtype=np.int32).reshape(3, columns) % (NUM_PAGES - 1) + 1


def _gives_ones(
    op: AttentionOp[Any], plan: Any, spec: AttentionSpec, kv: torch.Tensor, num_tokens: int
) -> bool:
    q = torch.ones(num_tokens, spec.num_heads, spec.head_dim, dtype=spec.dtype, device=spec.device)
    out = torch.zeros_like(q)
    op.run(plan, q=q, kv=kv, out=out)
    return torch.allclose(out.float(), torch.ones_like(out, dtype=torch.float32), atol=0.02)
