"""Triton device code of the vectors of adapters: a gain and a shift of each output column.

Rows of weights start at multiples of 64 elements and a page holds a multiple of 64, so a chunk of
64 aligned elements never straddles a page.

Shape legend: C chunks of 64 columns, N the columns in a chunk.
"""

import triton
import triton.language as tl

ROWS_AT = tl.constexpr(4)  # in `meta`, behind the number of rows: the rows, then their slots


@triton.jit
def _load_vector(pool, pages, start, chunk_C, out, row_stride, PAGE: tl.constexpr):
    """The sum of two rows of a vector, float32 [C, N]; the second is `row_stride` further on."""
    lane_N = tl.arange(0, 64)
    mask_C = chunk_C < out
    mask_CN = chunk_C[:, None] + lane_N[None, :] < out
    high_C = start + chunk_C
    low_C = high_C + row_stride
    page_C = tl.load(pages + high_C // PAGE, mask=mask_C, other=0)
    at_C = tl.multiple_of(page_C.to(tl.int64) * PAGE + high_C % PAGE, 64)
    high_CN = tl.load(pool + at_C[:, None] + lane_N[None, :], mask=mask_CN, other=0.0)
    page_C = tl.load(pages + low_C // PAGE, mask=mask_C, other=0)
    at_C = tl.multiple_of(page_C.to(tl.int64) * PAGE + low_C % PAGE, 64)
    low_CN = tl.load(pool + at_C[:, None] + lane_N[None, :], mask=mask_CN, other=0.0)
    return high_CN.to(tl.float32) + low_CN.to(tl.float32)


@triton.jit(do_not_specialize=["layer", "pages_stride", "table_stride", "slot_stride"])
def vectors_kernel(
    y, meta, pool, page_table, gain_start, shift_start,
    layer, y_stride, layer_stride, pages_stride, table_stride, slot_stride, module_stride,
    FIRST_MODULE: tl.constexpr, NUM_MODULES: tl.constexpr,
    OUT_0: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr,
    START_1: tl.constexpr, START_2: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t, n] = gain[slot, n] * y[t, n] + shift[slot, n] for the rows t of `meta`.

    A unit of work is BLOCK columns of one module in one row.
    """
    PANELS_0: tl.constexpr = (OUT_0 + BLOCK - 1) // BLOCK
    PANELS_1: tl.constexpr = (OUT_1 + BLOCK - 1) // BLOCK
    PANELS_2: tl.constexpr = (OUT_2 + BLOCK - 1) // BLOCK
    PANELS: tl.constexpr = PANELS_0 + PANELS_1 + PANELS_2
    pool += layer.to(tl.int64) * layer_stride
    num_rows = tl.load(meta)
    for unit in range(tl.program_id(0), num_rows * PANELS, tl.num_programs(0)):
        row, panel = unit // PANELS, unit % PANELS
        token = tl.load(meta + ROWS_AT + row).to(tl.int64)
        slot = tl.load(meta + ROWS_AT + num_rows + row)
        module, out, column = 0, OUT_0, 0
        if NUM_MODULES > 1:
            is_1 = panel >= PANELS_0
            module = tl.where(is_1, 1, 0)
            out = tl.where(is_1, OUT_1, OUT_0)
            column = tl.where(is_1, START_1, 0)
            panel = tl.where(is_1, panel - PANELS_0, panel)
        if NUM_MODULES > 2:
            is_2 = (module == 1) & (panel >= PANELS_1)
            module = tl.where(is_2, 2, module)
            out = tl.where(is_2, OUT_2, out)
            column = tl.where(is_2, START_2, column)
            panel = tl.where(is_2, panel - PANELS_1, panel)
        place = layer * table_stride + slot * slot_stride + (FIRST_MODULE + module) * module_stride
        gain_at, shift_at = tl.load(gain_start + place), tl.load(shift_start + place)
        if (gain_at != 0) | (shift_at != 0):
            pages = page_table + slot.to(tl.int64) * pages_stride
            chunk_C = panel * BLOCK + tl.arange(0, BLOCK // 64) * 64
            column_CN = chunk_C[:, None] + tl.arange(0, 64)[None, :]
            y_CN = y + token * y_stride + column + column_CN
            stride = (out + 63) // 64 * 64
            mask_CN = column_CN < out
            value_CN = tl.load(y_CN, mask=mask_CN, other=0.0).to(tl.float32)
            if gain_at != 0:
                value_CN *= _load_vector(pool, pages, gain_at, chunk_C, out, stride, PAGE)
            if shift_at != 0:
                value_CN += _load_vector(pool, pages, shift_at, chunk_C, out, stride, PAGE)
            tl.store(y_CN, value_CN.to(y.dtype.element_ty), mask=mask_CN)
