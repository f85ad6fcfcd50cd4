"""Triton device code of a decoder layer's small operators. The contract says what they compute.

Shape legend: C columns of a row, H heads of a block, D half a head. If PDL is set, a kernel starts
while the previous one still runs, and reads only weights until that one has ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_E4M3_MAX = tl.constexpr(448.0)
_MIN_SCALE = tl.constexpr(1e-12)


@triton.jit
def _to_e4m3(x):
    """Returns x in e4m3, saturated."""
    return tl.clamp(x, -_E4M3_MAX, _E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def _store_e4m3_row(y_C, values, scales, row, column_C, mask_C, SIZE: tl.constexpr):
    """Write one row in e4m3, with its scale. Masked elements of y_C are 0."""
    scale = tl.maximum(tl.max(tl.abs(y_C), axis=0) / _E4M3_MAX, _MIN_SCALE)
    tl.store(scales + row, scale)
    tl.store(values + row * SIZE + column_C, _to_e4m3(y_C / scale), mask=mask_C)


@triton.jit
def _silu_mul(gate_C, mask_C, dtype: tl.constexpr, SIZE: tl.constexpr):
    """Returns SiLU(gate) * up; up lies SIZE elements behind gate."""
    x_C = tl.load(gate_C, mask=mask_C, other=0.0).to(tl.float32)
    up_C = tl.load(gate_C + SIZE, mask=mask_C, other=0.0).to(tl.float32)
    silu_C = (x_C / (1.0 + tl.exp(-x_C))).to(dtype).to(tl.float32)
    return (silu_C * up_C).to(dtype)


@triton.jit
def rms_norm_kernel(
    x, residual, weight, y, values, scales, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each program norms one row. With ADD it first adds x to the residual and norms that."""
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, BLOCK)
    mask_C = column_C < SIZE
    weight_C = tl.load(weight + column_C, mask=mask_C, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype = y.dtype.element_ty
    x_C = tl.load(x + row * x_stride + column_C, mask=mask_C, other=0.0).to(tl.float32)
    if ADD:
        residual_C = residual + row * residual_stride + column_C
        x_C += tl.load(residual_C, mask=mask_C, other=0.0).to(tl.float32)
        rounded_C = x_C.to(dtype)
        tl.store(residual_C, rounded_C, mask=mask_C)
        x_C = rounded_C.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_C * x_C, axis=0) / SIZE + eps)
    y_C = ((x_C * scale).to(dtype).to(tl.float32) * weight_C).to(dtype)
    tl.store(y + row * SIZE + column_C, y_C, mask=mask_C)
    if FP8:
        _store_e4m3_row(y_C.to(tl.float32), values, scales, row, column_C, mask_C, SIZE)


@triton.jit
def silu_mul_kernel(
    gate_up, y, gate_up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Each program computes BLOCK columns of one row."""
    NUM_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    column_C = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask_C = column_C < SIZE
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate_C = gate_up + row * gate_up_stride + column_C
    y_C = _silu_mul(gate_C, mask_C, y.dtype.element_ty, SIZE)
    tl.store(y + row * SIZE + column_C, y_C, mask=mask_C)


@triton.jit
def silu_mul_fp8_kernel(
    gate_up, y, values, scales, gate_up_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program computes one row, in both types."""
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, BLOCK)
    mask_C = column_C < SIZE
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate_C = gate_up + row * gate_up_stride + column_C
    y_C = _silu_mul(gate_C, mask_C, y.dtype.element_ty, SIZE)
    tl.store(y + row * SIZE + column_C, y_C, mask=mask_C)
    _store_e4m3_row(y_C.to(tl.float32), values, scales, row, column_C, mask_C, SIZE)


@triton.jit
def quantize_rows_kernel(
    x, values, scales, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Each program rounds one row."""
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, BLOCK)
    mask_C = column_C < SIZE
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_C = tl.load(x + row * x_stride + column_C, mask=mask_C, other=0.0).to(tl.float32)
    _store_e4m3_row(x_C, values, scales, row, column_C, mask_C, SIZE)


@triton.jit
def _move_heads(
    source, target, cos_sin, norm, first, limit, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Copy heads first .. first + HEADS below limit to target, normed and rotated.

    All is rounded to the source's type first, and then to the target's.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    head_H = first + tl.arange(0, HEADS)
    # Angles and weights are read once for each head, from L1, in the layout in which they are used.
    column_HD = tl.broadcast_to(tl.arange(0, BLOCK_D)[None, :], (HEADS, BLOCK_D))
    mask_HD = (head_H < limit)[:, None] & (column_HD < HALF)
    place_HD = head_H[:, None] * HEAD_DIM + column_HD
    a_HD = tl.load(source + place_HD, mask=mask_HD, other=0.0)
    b_HD = tl.load(source + place_HD + HALF, mask=mask_HD, other=0.0)
    dtype = source.dtype.element_ty
    if ROTATE:
        cos_HD = tl.load(cos_sin + column_HD, mask=mask_HD, other=0.0)
        sin_HD = tl.load(cos_sin + HALF + column_HD, mask=mask_HD, other=0.0)
        a_HD, b_HD = a_HD.to(tl.float32), b_HD.to(tl.float32)
        if NORM:
            square_H = tl.sum(a_HD * a_HD, axis=1) + tl.sum(b_HD * b_HD, axis=1)
            scale_HD = tl.rsqrt(square_H / HEAD_DIM + eps)[:, None]
            norm_a_HD = tl.load(norm + column_HD, mask=mask_HD, other=0.0).to(tl.float32)
            norm_b_HD = tl.load(norm + HALF + column_HD, mask=mask_HD, other=0.0).to(tl.float32)
            a_HD = (a_HD * scale_HD).to(dtype).to(tl.float32) * norm_a_HD
            b_HD = (b_HD * scale_HD).to(dtype).to(tl.float32) * norm_b_HD
            a_HD, b_HD = a_HD.to(dtype).to(tl.float32), b_HD.to(dtype).to(tl.float32)
        a_HD, b_HD = a_HD * cos_HD - b_HD * sin_HD, b_HD * cos_HD + a_HD * sin_HD
    a_HD, b_HD = a_HD.to(dtype), b_HD.to(dtype)
    if target.dtype.element_ty == tl.float8e4nv:
        a_HD, b_HD = _to_e4m3(a_HD.to(tl.float32)), _to_e4m3(b_HD.to(tl.float32))
    tl.store(target + place_HD, a_HD, mask=mask_HD)
    tl.store(target + place_HD + HALF, b_HD, mask=mask_HD)


@triton.jit
def rope_store_kv_kernel(
    qkv, cos_sin, kv, kv_rows, q, q_norm, k_norm, qkv_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program handles HEADS heads of q, k or v of one token."""
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    NUM_BLOCKS: tl.constexpr = Q_BLOCKS + 2 * KV_BLOCKS
    KV_WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    block = tl.program_id(0) % NUM_BLOCKS
    source = qkv + token * qkv_stride
    cos_sin += token * HEAD_DIM
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if block < Q_BLOCKS:
        _move_heads(
            source, q + token * (NUM_HEADS * HEAD_DIM), cos_sin, q_norm, block * HEADS,
            NUM_HEADS, eps, HEAD_DIM, HEADS, BLOCK_D, NORM, True,
        )  # fmt: skip
    elif block < Q_BLOCKS + KV_BLOCKS:
        row = tl.load(kv_rows + token)
        _move_heads(
            source + NUM_HEADS * HEAD_DIM, kv + row * KV_WIDTH, cos_sin, k_norm,
            (block - Q_BLOCKS) * HEADS, NUM_KV_HEADS, eps, HEAD_DIM, HEADS, BLOCK_D, NORM, True,
        )  # fmt: skip
    else:
        row = tl.load(kv_rows + token) + BLOCK_TOKENS
        _move_heads(
            source + (NUM_HEADS * HEAD_DIM + KV_WIDTH), kv + row * KV_WIDTH, cos_sin, k_norm,
            (block - Q_BLOCKS - KV_BLOCKS) * HEADS, NUM_KV_HEADS, eps, HEAD_DIM, HEADS, BLOCK_D,
            NORM, False,
        )  # fmt: skip
