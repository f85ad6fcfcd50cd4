"""Triton device code of SGMV: shrink (x A, split over K) and expand (v B, added to y).

Both take their work from `meta`, the int32 array of a plan. A launch therefore does not depend on
the batch: a grid of any size covers the units of work in turn. For each group of projections meta
holds, from HEADER on, the fields numbered below. Positions of lists count from meta's start.

Weights are read in place through the adapter's page table. A row of weights starts at a multiple
of ALIGN elements, itself a multiple of 64, and so does a page. So a chunk of 64 aligned elements
never straddles a page. Pointers are built per chunk, and the loads inside a chunk stay 16 bytes
wide. Weights in e4m3 become numbers of the type of x and y in registers.

Shape legend: M rows of a tile, K input features, R ranks, N output columns, C chunks of 64.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NUM_ITEMS = tl.constexpr(0)
ITEMS_AT = tl.constexpr(1)  # items: (slot, first row, rows, first rank)
NUM_TILES = tl.constexpr(2)
TILES_AT = tl.constexpr(3)  # tiles: (slot, first row, rows, unused)
NUM_SPLITS = tl.constexpr(4)
SPLIT_CHUNKS = tl.constexpr(5)  # chunks of 64 input features in a split
PANEL_BLOCKS = tl.constexpr(6)  # blocks of columns that one unit of expand takes
V_MODULE_STRIDE = tl.constexpr(7)  # a multiple of 16
NUM_ROWS = tl.constexpr(8)  # rows with an adapter


@triton.jit(do_not_specialize=["layer", "pages_stride", "table_stride", "slot_stride"])
def shrink_kernel(
    x, meta, v, pool, page_table, rank, a_start,
    layer, x_stride, layer_stride, pages_stride, table_stride, slot_stride, module_stride,
    HEADER: tl.constexpr, ORDER_AT: tl.constexpr,
    FIRST_MODULE: tl.constexpr, NUM_MODULES: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """v[split, p, m, r] = x[order[p], split of K] @ A[slot, m, r, split of K], fp32.

    A unit is a split of an item. An item is BLOCK_M rows of one adapter and BLOCK_R of the ranks of
    all modules, one module after another (q, k, v), so that x is read once for all modules.
    """
    K_ROW: tl.constexpr = (K + ALIGN - 1) // ALIGN * ALIGN
    header = meta + HEADER
    num_splits = tl.load(header + NUM_SPLITS)
    num_units = tl.load(header + NUM_ITEMS) * num_splits
    items = meta + tl.load(header + ITEMS_AT)
    split_k = tl.load(header + SPLIT_CHUNKS) * 64
    v_module_stride = tl.multiple_of(tl.load(header + V_MODULE_STRIDE), 16)
    num_rows = tl.load(header + NUM_ROWS)
    pool += layer.to(tl.int64) * layer_stride
    at = layer * table_stride + FIRST_MODULE * module_stride
    lane = tl.arange(0, 64)
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        item = items + unit // num_splits * 4
        split = unit % num_splits
        slot, first, rows = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        flat_R = tl.load(item + 3) + tl.arange(0, BLOCK_R)
        place = at + slot * slot_stride
        end_0 = tl.load(rank + place)
        rank_R = flat_R
        start_R = tl.load(a_start + place) + flat_R * K_ROW
        v_column_R = flat_R
        total = end_0
        if NUM_MODULES > 1:
            total += tl.load(rank + place + module_stride)
            rank_R = flat_R - end_0
            start_1 = tl.load(a_start + place + module_stride)
            start_R = tl.where(flat_R < end_0, start_R, start_1 + rank_R * K_ROW)
            v_column_R = tl.where(flat_R < end_0, flat_R, v_module_stride + rank_R)
        if NUM_MODULES > 2:
            end_1 = total
            total += tl.load(rank + place + 2 * module_stride)
            rank_R = flat_R - end_1
            start_2 = tl.load(a_start + place + 2 * module_stride)
            start_R = tl.where(flat_R < end_1, start_R, start_2 + rank_R * K_ROW)
            v_column_R = tl.where(flat_R < end_1, v_column_R, 2 * v_module_stride + rank_R)
        mask_R = flat_R < total
        row_M = tl.arange(0, BLOCK_M)
        mask_M = row_M < rows
        token_M = tl.load(meta + ORDER_AT + first + row_M, mask=mask_M, other=0).to(tl.int64)
        x_MK = x + token_M[:, None] * x_stride + lane[None, :]
        pages = page_table + slot.to(tl.int64) * pages_stride
        begin = split * split_k
        # The page of the next chunk is looked up one chunk ahead. A lookup in the same iteration
        # would halve the depth of the compiler's pipeline.
        page_R = tl.load(pages + (start_R + begin) // PAGE, mask=mask_R, other=0)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        acc_MR = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k in range(begin, tl.minimum(begin + split_k, K), 64):
            element_R = start_R + k
            offset_R = tl.multiple_of(page_R.to(tl.int64) * PAGE + element_R % PAGE, 64)
            mask_RK = mask_R[:, None]
            mask_MK = mask_M[:, None]
            if K % 64 != 0:
                mask_RK = mask_RK & (k + lane < K)[None, :]
                mask_MK = mask_MK & (k + lane < K)[None, :]
            chunk_MK = tl.load(x_MK + k, mask=mask_MK, other=0.0)
            a_RK = tl.load(pool + offset_R[:, None] + lane[None, :], mask=mask_RK, other=0.0)
            a_KR = tl.trans(a_RK.to(x.dtype.element_ty))
            acc_MR = tl.dot(chunk_MK, a_KR, acc_MR, input_precision="ieee")
            next_R = start_R + tl.minimum(k + 64, K_ROW - 64)
            page_R = tl.load(pages + next_R // PAGE, mask=mask_R, other=0)
        row_M = (split * num_rows + first + row_M) * (NUM_MODULES * v_module_stride)
        v_MR = v + row_M[:, None] + v_column_R[None, :]
        tl.store(v_MR, acc_MR, mask=mask_M[:, None] & mask_R[None, :])
    if PDL:  # programs without work wait too: the next kernel must not overtake the previous one
        gdc_wait()


@triton.jit
def _load_weights(
    pool, pages, start_R, mask_R, first, limit, PAGE: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """Elements first .. first + W of R weight rows that start at start_R; zero past limit."""
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
def _load_shrunk(
    v, row_M, mask_M, rank_R, limit, num_splits, split_stride, row_stride,
    MAX_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum of the splits, in their order, so that two runs agree bit for bit."""
    # Loads go up to a multiple of 16 ranks, to be wide. Beyond the limit memory may hold NaN.
    wide_R = rank_R // 16 * 16
    pointer_MR = v + row_M[:, None] * row_stride + rank_R[None, :]
    sum_MR = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for split in tl.static_range(MAX_SPLITS):  # unrolled, so that all loads are in flight
        mask_R = wide_R < tl.where(num_splits > split, limit, 0)
        mask_MR = mask_M[:, None] & mask_R[None, :]
        sum_MR += tl.load(pointer_MR + split * split_stride, mask=mask_MR, other=0.0)
    return tl.where((rank_R < limit)[None, :], sum_MR, 0.0)


@triton.jit(do_not_specialize=["layer", "pages_stride", "table_stride", "slot_stride"])
def expand_kernel(
    y, meta, v, pool, page_table, rank, b_start, scale,
    layer, y_stride, layer_stride, pages_stride, table_stride, slot_stride, module_stride,
    HEADER: tl.constexpr, ORDER_AT: tl.constexpr,
    FIRST_MODULE: tl.constexpr, NUM_MODULES: tl.constexpr, OUT_0: tl.constexpr,
    OUT_1: tl.constexpr, OUT_2: tl.constexpr, START_1: tl.constexpr, START_2: tl.constexpr,
    PAGE: tl.constexpr, ALIGN: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, MAX_RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[order[p], out_m] += scale * sum over splits of v[:, p, m] @ B[slot, m], in place.

    A unit is a tile and a panel. A panel is some blocks of columns of one module; each is fetched
    while the one before is computed. An element of y belongs to one unit.
    """
    BLOCKS_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_2: tl.constexpr = (OUT_2 + BLOCK_N - 1) // BLOCK_N
    header = meta + HEADER
    tiles = meta + tl.load(header + TILES_AT)
    num_splits = tl.load(header + NUM_SPLITS)
    panel_blocks = tl.load(header + PANEL_BLOCKS)
    v_module_stride = tl.multiple_of(tl.load(header + V_MODULE_STRIDE), 16)
    v_row_stride = NUM_MODULES * v_module_stride
    v_split_stride = tl.load(header + NUM_ROWS) * v_row_stride
    panels_0 = tl.cdiv(BLOCKS_0, panel_blocks)
    panels_1 = tl.cdiv(BLOCKS_1, panel_blocks)
    num_panels = panels_0 + panels_1 + tl.cdiv(BLOCKS_2, panel_blocks)
    num_units = tl.load(header + NUM_TILES) * num_panels
    pool += layer.to(tl.int64) * layer_stride
    at = layer * table_stride + FIRST_MODULE * module_stride
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        panel = unit % num_panels
        module = (panel >= panels_0).to(tl.int32) + (panel >= panels_0 + panels_1).to(tl.int32)
        width = tl.where(module == 0, OUT_0, tl.where(module == 1, OUT_1, OUT_2))
        width_row = (width + ALIGN - 1) // ALIGN * ALIGN
        column = tl.where(module == 0, 0, tl.where(module == 1, START_1, START_2))
        panel -= tl.where(module == 0, 0, tl.where(module == 1, panels_0, panels_0 + panels_1))
        tile = tiles + unit // num_panels * 4
        slot, first, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        place = at + module * module_stride + slot * slot_stride
        limit = tl.load(rank + place)
        if limit > 0:
            row_M = tl.arange(0, BLOCK_M)
            mask_M = row_M < rows
            token_M = tl.load(meta + ORDER_AT + first + row_M, mask=mask_M, other=0).to(tl.int64)
            row_M += first
            rank_R = tl.arange(0, BLOCK_R)
            start = tl.load(b_start + place)
            factor = tl.load(scale + place)
            pages = page_table + slot.to(tl.int64) * pages_stride
            begin = panel * panel_blocks * BLOCK_N
            end = tl.minimum(begin + panel_blocks * BLOCK_N, width)
            mask_R = rank_R < limit
            n_N = tl.arange(0, BLOCK_N)
            y_MN = y + token_M[:, None] * y_stride + (column + n_N)[None, :]
            mask_MN = mask_M[:, None] & (begin + n_N < width)[None, :]
            base_MN = tl.load(y_MN + begin, mask=mask_MN, other=0.0)
            b_RN = _load_weights(
                pool, pages, start + rank_R * width_row, mask_R, begin, width, PAGE,
                BLOCK_R, BLOCK_N,
            )  # fmt: skip
            if PDL:  # weights and y do not depend on shrink, only v does
                gdc_wait()
                gdc_launch_dependents()
            shrunk = v + module * v_module_stride
            sum_MR = _load_shrunk(
                shrunk, row_M, mask_M, rank_R, limit, num_splits, v_split_stride, v_row_stride,
                MAX_SPLITS, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            first_MR = (sum_MR * factor).to(y.dtype.element_ty)
            for n in range(begin, end, BLOCK_N):
                next_n = n + BLOCK_N
                next_width = tl.where(next_n < end, width, 0)
                mask_next_MN = mask_M[:, None] & (next_n + n_N < next_width)[None, :]
                next_MN = tl.load(y_MN + next_n, mask=mask_next_MN, other=0.0)
                next_RN = _load_weights(
                    pool, pages, start + rank_R * width_row, mask_R, next_n, next_width, PAGE,
                    BLOCK_R, BLOCK_N,
                )  # fmt: skip
                own_RN = b_RN.to(y.dtype.element_ty)
                acc_MN = tl.dot(first_MR, own_RN, input_precision="ieee")
                if MAX_RANK > BLOCK_R:
                    for r in range(BLOCK_R, limit, BLOCK_R):
                        more_R = r + rank_R
                        sum_MR = _load_shrunk(
                            shrunk, row_M, mask_M, more_R, limit, num_splits, v_split_stride,
                            v_row_stride, MAX_SPLITS, BLOCK_M, BLOCK_R,
                        )  # fmt: skip
                        b_RN = _load_weights(
                            pool, pages, start + more_R * width_row, more_R < limit, n, width, PAGE,
                            BLOCK_R, BLOCK_N,
                        )  # fmt: skip
                        more_MR = (sum_MR * factor).to(y.dtype.element_ty)
                        own_RN = b_RN.to(y.dtype.element_ty)
                        acc_MN = tl.dot(more_MR, own_RN, acc_MN, input_precision="ieee")
                sum_MN = (base_MN.to(tl.float32) + acc_MN).to(y.dtype.element_ty)
                tl.store(y_MN + n, sum_MN, mask=mask_MN)
                base_MN = next_MN
                b_RN = next_RN
                mask_MN = mask_next_MN
    if PDL:
        gdc_wait()
