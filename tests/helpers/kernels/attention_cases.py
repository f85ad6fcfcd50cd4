"""Batches, pools and captured graphs for the tests of op ``attention``."""

from typing import Any

import numpy as np
import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionSpec

Sequences = list[tuple[int, int]]  # (query tokens, context length), decode rows first

BATCHES: dict[str, Sequences] = {
    "one-token": [(1, 1)],
    "decode": [(1, 5), (1, 1), (1, 16), (1, 17), (1, 64), (1, 65), (1, 130)],
    "decode-equal": [(1, 33)] * 5,
    "prefill": [(7, 7), (1, 1), (33, 33), (130, 130)],
    "prefill-cached": [(5, 37), (16, 48), (1, 64), (70, 200)],
    "mixed": [(1, 40), (1, 3), (1, 129), (12, 12), (1, 90), (31, 95), (3, 3)],
}


def make_spec(
    dtype: torch.dtype,
    device: str,
    heads: tuple[int, int],
    *,
    head_dim: int = 64,
    block_tokens: int = 16,
    max_num_seqs: int = 64,
    max_len: int = 1024,
    kv_dtype: torch.dtype | None = None,
) -> AttentionSpec:
    return AttentionSpec(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_tokens=block_tokens,
        scale=head_dim**-0.5 * 1.3,
        dtype=dtype,
        device=torch.device(device),
        max_num_seqs=max_num_seqs,
        max_num_tokens=2048,
        max_pages=-(-max_len // block_tokens),
        kv_dtype=kv_dtype,
    )


def make_batch(
    sequences: Sequences, spec: AttentionSpec, *, spare_columns: int = 2
) -> tuple[AttentionBatch, int]:
    """Returns a batch over shuffled pages, none shared, page 0 unused; and the pool's pages.

    Entries beyond a sequence's pages name a page that no sequence owns.
    """
    counts = [-(-kv_len // spec.block_tokens) for _, kv_len in sequences]
    num_pages = sum(counts) + 4
    free = (np.random.default_rng(3).permutation(num_pages - 1) + 1).tolist()
    stale = free.pop()
    table = np.full((len(sequences), max(counts) + spare_columns), stale, dtype=np.int32)
    for b, count in enumerate(counts):
        table[b, :count] = [free.pop() for _ in range(count)]
    query_lens = np.array([query_len for query_len, _ in sequences], dtype=np.int32)
    batch = AttentionBatch(
        query_lens=query_lens,
        kv_lens=np.array([kv_len for _, kv_len in sequences], dtype=np.int32),
        num_decodes=int(np.argmax(np.append(query_lens, 0) != 1)),
        page_table=table,
    )
    return batch, num_pages


def make_kv(
    batch: AttentionBatch, num_pages: int, spec: AttentionSpec, tail: float
) -> torch.Tensor:
    """Returns a layer: pages without an owner are NaN, rows beyond a sequence's end are `tail`."""
    shape = (num_pages, 2, spec.block_tokens, spec.num_kv_heads, spec.head_dim)
    kv = torch.full(shape, float("nan"))
    generator = torch.Generator().manual_seed(4)
    for b, kv_len in enumerate(batch.kv_lens.tolist()):
        for start in range(0, kv_len, spec.block_tokens):
            page = int(batch.page_table[b, start // spec.block_tokens])
            used = min(spec.block_tokens, kv_len - start)
            kv[page] = tail
            kv[page, :, :used] = torch.randn(kv[page, :, :used].shape, generator=generator)
    kv[0] = kv[0].nan_to_num(tail)  # the null page: padding may read it
    return kv.to(spec.page_dtype).to(spec.device)


def random_decodes(
    rng: np.random.Generator, spec: AttentionSpec, num_seqs: int, num_pages: int
) -> AttentionBatch:
    """Returns decodes of random lengths over pages 1 to num_pages - 2. Stale entries name the last
    page."""
    block = spec.block_tokens
    longest = spec.max_pages * block
    awkward = [1, block, block + 1, 2 * block - 1, longest]
    lens = rng.integers(1, longest + 1, num_seqs)
    for b in range(0, num_seqs, 3):
        lens[b] = rng.choice(awkward)
    table = rng.integers(1, num_pages - 1, (num_seqs, spec.max_pages))
    owned = np.arange(spec.max_pages) < -(-lens[:, None] // block)
    return AttentionBatch(
        query_lens=np.ones(num_seqs, dtype=np.int32),
        kv_lens=lens.astype(np.int32),
        num_decodes=num_seqs,
        page_table=np.where(owned, table, num_pages - 1).astype(np.int32),
    )


class GraphRunner:
    """Captures an op's `run` once for each number of rows, over one q, one out and one pool.

    The pool's last page is NaN, every other page random.
    """

    def __init__(
        self, op: Any, spec: AttentionSpec, row_counts: tuple[int, ...], num_pages: int = 200
    ) -> None:
        self.op, self.spec, self.num_pages = op, spec, num_pages
        shape = (num_pages, 2, spec.block_tokens, spec.num_kv_heads, spec.head_dim)
        kv = torch.randn(shape, device=spec.device)
        kv[-1] = float("nan")
        self.kv = kv.to(spec.page_dtype)
        q_shape = (max(row_counts), spec.num_heads, spec.head_dim)
        self.q = torch.randn(q_shape, device=spec.device).to(spec.dtype)
        self.out = torch.zeros_like(self.q)
        self._graphs = {num_rows: self._capture(num_rows) for num_rows in row_counts}

    def _capture(self, num_rows: int) -> torch.cuda.CUDAGraph:
        rng = np.random.default_rng(0)
        plan = self.op.plan_graph(random_decodes(rng, self.spec, 1, self.num_pages), num_rows)
        self._run(plan, num_rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(plan, num_rows)
        return graph

    def _run(self, plan: Any, num_rows: int) -> None:
        self.op.run(plan, q=self.q[:num_rows], kv=self.kv, out=self.out[:num_rows])

    def replay(self, batch: AttentionBatch, num_rows: int) -> torch.Tensor:
        """Returns a copy of out [num_rows, ...]. Nothing waits for the GPU."""
        self.op.plan_graph(batch, num_rows)
        self._graphs[num_rows].replay()
        return self.out[:num_rows].clone()
