"""Triton device code of the collectives over symmetric memory.

Every rank runs the same launch. Program b of a rank meets program b of all peers at a barrier:
it raises a flag on each peer and lowers the flags that the peers raised here. Flags are compared
and swapped between 0 and 1, so a replayed CUDA graph finds them as the capture did.

Shape legend: C columns of a row.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _meet(flags, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Returns once program b of every peer has called it; what they wrote before is visible then.

    flags: int64 [WORLD], addresses of each rank's flags, int32 [programs, WORLD].
    """
    tl.debug_barrier()  # all threads' writes come before the release below
    program = tl.program_id(0)
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            theirs = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + program * WORLD + RANK
            while tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys") != 0:
                pass
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            mine = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + program * WORLD + peer
            while tl.atomic_cas(mine, 1, 0, sem="acquire", scope="sys") != 1:
                pass
    tl.debug_barrier()


@triton.jit
def _address_of(addresses, peer: tl.constexpr, dtype: tl.constexpr):
    """Returns a pointer to a peer's memory, which starts at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(addresses + peer).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _sum_row(
    partials, row, column_C, mask_C,
    dtype: tl.constexpr, SIZE: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """Returns the float32 sum of one row over the ranks, added in their order."""
    total_C = tl.zeros_like(column_C).to(tl.float32)
    for peer in tl.static_range(WORLD):
        base = _address_of(partials, peer, dtype)
        total_C += tl.load(
            base + row * SIZE + column_C, mask=mask_C, other=0.0, cache_modifier=".cg"
        ).to(tl.float32)
    return total_C


@triton.jit(do_not_specialize=["num_rows"])
def reduce_kernel(
    out, partials, flags, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
    WORLD: tl.constexpr, MEET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One-shot sum: every rank reads all partials. Rows go to the programs in turn."""
    column_C = tl.arange(0, BLOCK)
    mask_C = column_C < SIZE
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MEET:
        _meet(flags, RANK, WORLD)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        total_C = _sum_row(partials, row, column_C, mask_C, out.dtype.element_ty, SIZE, WORLD)
        tl.store(out + row * SIZE + column_C, total_C.to(out.dtype.element_ty), mask=mask_C)


@triton.jit(do_not_specialize=["num_rows"])
def reduce_add_norm_kernel(
    residual, weight, y, partials, flags, outs, num_rows, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
    TWO_SHOT: tl.constexpr, MEET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum over the ranks, added to the residual, then normed.

    One-shot: every rank does all rows and writes them to y. TWO_SHOT: a rank does its own share
    of the rows, keeps their residual, and writes the normed rows to `outs` of all ranks.

    partials, outs: int64 [WORLD], addresses of [num_rows, SIZE] on each rank.
    """
    column_C = tl.arange(0, BLOCK)
    mask_C = column_C < SIZE
    weight_C = tl.load(weight + column_C, mask=mask_C, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    first, limit = 0, num_rows
    if TWO_SHOT:
        share = (num_rows + WORLD - 1) // WORLD
        first = RANK * share
        limit = tl.minimum(first + share, num_rows)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MEET:
        _meet(flags, RANK, WORLD)
    for row in range(first + tl.program_id(0), limit, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        place_C = row * SIZE + column_C
        x_C = _sum_row(partials, row, column_C, mask_C, dtype, SIZE, WORLD)
        x_C += tl.load(residual + place_C, mask=mask_C, other=0.0).to(tl.float32)
        rounded_C = x_C.to(dtype)
        tl.store(residual + place_C, rounded_C, mask=mask_C)
        x_C = rounded_C.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x_C * x_C, axis=0) / SIZE + eps)
        y_C = ((x_C * scale).to(dtype).to(tl.float32) * weight_C).to(dtype)
        if TWO_SHOT:
            for peer in tl.static_range(WORLD):
                tl.store(_address_of(outs, peer, dtype) + place_C, y_C, mask=mask_C)
        else:
            tl.store(y + place_C, y_C, mask=mask_C)
    if TWO_SHOT and MEET:
        _meet(flags, RANK, WORLD)


@triton.jit(do_not_specialize=["num_rows"])
def gather_kernel(
    x, outs, flags, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
    WORLD: tl.constexpr, MEET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes this rank's [num_rows, WIDTH] to its columns of [num_rows, WORLD * WIDTH] on all."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MEET:
        _meet(flags, RANK, WORLD)
    dtype = x.dtype.element_ty
    for item in range(tl.program_id(0), num_rows * BLOCKS, tl.num_programs(0)):
        row = tl.cast(item // BLOCKS, tl.int64)
        column_C = item % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask_C = column_C < WIDTH
        value_C = tl.load(x + row * WIDTH + column_C, mask=mask_C)
        place_C = row * (WORLD * WIDTH) + RANK * WIDTH + column_C
        for peer in tl.static_range(WORLD):
            out = _address_of(outs, peer, dtype)
            tl.store(out + place_C, value_C, mask=mask_C)
    if MEET:
        _meet(flags, RANK, WORLD)
