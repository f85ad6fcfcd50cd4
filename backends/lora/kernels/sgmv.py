"""Triton device code of SGMV: shrink (x A, split over K) and expand (v B, added to y).

Weights are read in place through the adapter's page table. A row of weights starts at a
multiple of 64 elements and a page holds a multiple of 64, so a chunk of 64 aligned elements never
straddles a page: pointers are built per chunk, and the loads inside one stay 16 bytes wide.

Shape legend: M rows of a tile, K input features, R ranks, N output columns, C chunks of 64.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _load_weights(
    pool, pages, start_R, mask_R, first, limit, PAGE: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """Elements first .. first + W of R weight rows, each starting at start_R; zero past limit."""
    C: tl.constexpr = W // 64
    chunk_C = first + tl.arange(0, C) * 64
    element_RC = start_R[:, None] + chunk_C[None, :]
    mask_RC = mask_R[:, None] & (chunk_C < limit)[None, :]
    page_RC = tl.load(pages + element_RC // PAGE, mask=mask_RC, other=0)
    offset_RC = tl.multiple_of(page_RC.to(tl.int64) * PAGE + element_RC % PAGE, [64, 64])
    lane = tl.arange(0, 64)
    mask_RCL = mask_RC[:, :, None] & ((chunk_C[:, None] + lane[None, :]) < limit)[None, :, :]
    w_RCL = tl.load(pool + offset_RC[:, :, None] + lane[None, None, :], mask=mask_RCL, other=0.0)
    return tl.reshape(w_RCL, (R, W))


@triton.jit
def shrink_kernel(
    x, v, pool, items, order, page_table, rank, a_start,
    x_stride, pages_stride, num_slots, v_split_stride, v_row_stride, v_module_stride, k_per_split,
    K: tl.constexpr, K_ROW: tl.constexpr, NUM_MODULES: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """v[split, p, m, r] = x[order[p], split of K] @ A[slot, m, r, split of K], fp32.

    Axis 0 of the grid is (item, module), axis 1 the split. items[i] = (slot, first row, rows,
    first rank): BLOCK_M rows of one adapter and BLOCK_R of its ranks.
    """
    item = items + (tl.program_id(0) // NUM_MODULES) * 4
    module = tl.program_id(0) % NUM_MODULES
    split = tl.program_id(1)
    slot, first, rows = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    rank_R = tl.load(item + 3) + tl.arange(0, BLOCK_R)
    mask_R = rank_R < tl.load(rank + module * num_slots + slot)
    row_M = tl.arange(0, BLOCK_M)
    mask_M = row_M < rows
    token_M = tl.load(order + first + row_M, mask=mask_M, other=0).to(tl.int64)
    start_R = tl.load(a_start + module * num_slots + slot) + rank_R * K_ROW
    pages = page_table + slot.to(tl.int64) * pages_stride
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    begin = split * k_per_split
    for k in range(begin, tl.minimum(begin + k_per_split, K), BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        x_MK = tl.load(
            x + token_M[:, None] * x_stride + k_K[None, :],
            mask=mask_M[:, None] & (k_K < K)[None, :],
            other=0.0,
        )
        a_RK = _load_weights(pool, pages, start_R, mask_R, k, K, PAGE, BLOCK_R, BLOCK_K)
        acc_MR = tl.dot(x_MK, tl.trans(a_RK), acc_MR, input_precision="ieee")
    out = v + split * v_split_stride + module * v_module_stride
    out_MR = out + (first + row_M).to(tl.int64)[:, None] * v_row_stride + rank_R[None, :]
    tl.store(out_MR, acc_MR, mask=mask_M[:, None] & mask_R[None, :])


@triton.jit
def _load_shrunk(
    v, row_M, mask_M, rank_R, limit, v_split_stride, v_row_stride,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum of the splits in their order, so that two runs agree bit for bit."""
    mask_MR = mask_M[:, None] & (rank_R < limit)[None, :]
    pointer_MR = v + row_M.to(tl.int64)[:, None] * v_row_stride + rank_R[None, :]
    sum_MR = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        sum_MR += tl.load(pointer_MR + split * v_split_stride, mask=mask_MR, other=0.0)
    return sum_MR


@triton.jit
def expand_kernel(
    y, v, pool, tiles, order, page_table, rank, b_start, scale,
    y_stride, pages_stride, num_slots, v_split_stride, v_row_stride, v_module_stride,
    OUT_0: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr, PAGE: tl.constexpr,
    START_1: tl.constexpr, START_2: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[order[p], out_m] += scale * sum over splits of v[:, p, m] @ B[slot, m], in place.

    Axis 0 of the grid is the block of columns (module 0's, then 1's, then 2's), axis 1 the tile.
    tiles[i] = (slot, first row, rows, unused). Each element of y belongs to one program.
    """
    BLOCKS_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    module = (block >= BLOCKS_0).to(tl.int32) + (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
    width = tl.where(module == 0, OUT_0, tl.where(module == 1, OUT_1, OUT_2))
    width_row = (width + 63) // 64 * 64
    column = tl.where(module == 0, 0, tl.where(module == 1, START_1, START_2))
    block -= tl.where(module == 0, 0, tl.where(module == 1, BLOCKS_0, BLOCKS_0 + BLOCKS_1))
    tile = tiles + tl.program_id(1) * 4
    slot, first, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    limit = tl.load(rank + module * num_slots + slot)
    if limit > 0:
        row_M = tl.arange(0, BLOCK_M)
        mask_M = row_M < rows
        token_M = tl.load(order + first + row_M, mask=mask_M, other=0).to(tl.int64)
        row_M += first
        rank_R = tl.arange(0, BLOCK_R)
        start = tl.load(b_start + module * num_slots + slot)
        factor = tl.load(scale + module * num_slots + slot)
        pages = page_table + slot.to(tl.int64) * pages_stride
        n = block * BLOCK_N
        n_N = n + tl.arange(0, BLOCK_N)
        y_MN = y + token_M[:, None] * y_stride + (column + n_N)[None, :]
        mask_MN = mask_M[:, None] & (n_N < width)[None, :]
        b_RN = _load_weights(
            pool, pages, start + rank_R * width_row, rank_R < limit, n, width, PAGE,
            BLOCK_R, BLOCK_N,
        )  # fmt: skip
        base_MN = tl.load(y_MN, mask=mask_MN, other=0.0)
        if PDL:  # weights and y do not depend on the shrink before: only v does
            gdc_wait()
            gdc_launch_dependents()
        shrunk = v + module * v_module_stride
        v_MR = _load_shrunk(
            shrunk, row_M, mask_M, rank_R, limit, v_split_stride, v_row_stride,
            SPLITS, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        acc_MN = tl.dot((v_MR * factor).to(b_RN.dtype), b_RN, input_precision="ieee")
        for r in range(BLOCK_R, limit, BLOCK_R):
            rank_R = r + tl.arange(0, BLOCK_R)
            v_MR = _load_shrunk(
                shrunk, row_M, mask_M, rank_R, limit, v_split_stride, v_row_stride,
                SPLITS, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            b_RN = _load_weights(
                pool, pages, start + rank_R * width_row, rank_R < limit, n, width, PAGE,
                BLOCK_R, BLOCK_N,
            )  # fmt: skip
            acc_MN = tl.dot((v_MR * factor).to(b_RN.dtype), b_RN, acc_MN, input_precision="ieee")
        tl.store(y_MN, (base_MN.to(tl.float32) + acc_MN).to(y.dtype.element_ty), mask=mask_MN)
    elif PDL:
        gdc_wait()
