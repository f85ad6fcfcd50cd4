"""Sequences over pages in compressed rows: one list of pages after another."""

from dataclasses import dataclass

import numpy as np

from loraplex.backends.attention.contract import AttentionBatch, Int32Array


@dataclass(frozen=True, slots=True)
class PagedRows:
    """n sequences, on the CPU."""

    query_starts: Int32Array  # [n + 1]
    kv_lens: Int32Array  # [n]
    page_starts: Int32Array  # [n + 1], into page_ids
    last_page_lens: Int32Array  # [n], 1 to block_tokens
    page_ids: Int32Array


def paged_rows(
    batch: AttentionBatch, start: int, end: int, block_tokens: int, num_padding: int = 0
) -> PagedRows:
    """Returns sequences `start` to `end` of the batch, then padding of one token in page 0 each.

    Only pages that a sequence owns are listed, so no library reads through a stale entry.

    Raises:
        ValueError: the page table is too narrow for the longest sequence.
    """
    kv_lens = batch.kv_lens[start:end]
    counts = -(-kv_lens // block_tokens)
    table = batch.page_table[start:end, : counts.max(initial=0)]
    page_ids = table[np.arange(table.shape[1]) < counts[:, None]]
    if len(page_ids) != counts.sum():
        raise ValueError(
            f"the page table has {batch.page_table.shape[1]} columns, "
            f"the longest sequence has {counts.max()} pages"
        )
    padding = np.ones(num_padding, dtype=np.int32)
    kv_lens, counts, query_lens = (
        np.concatenate((array, padding), dtype=np.int32)
        for array in (kv_lens, counts, batch.query_lens[start:end])
    )
    return PagedRows(
        query_starts=_starts(query_lens),
        kv_lens=kv_lens,
        page_starts=_starts(counts),
        last_page_lens=kv_lens - (counts - 1) * block_tokens,
        page_ids=np.concatenate((page_ids, 0 * padding), dtype=np.int32),
    )


def _starts(lens: Int32Array) -> Int32Array:
    starts = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, out=starts[1:])
    return starts
