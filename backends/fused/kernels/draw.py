"""Triton device code of `draw`: the best of each split of a row, then the best of the splits.

A candidate is one int64. Its high half holds the value's bits, mapped so that integers order like
the values. Its low half is 2^31 - 1 - token id. So the greatest candidate is the best, and the
lowest token id among equal values, in whatever order candidates are compared.

The value of a NaN or +inf is +inf, and no other value is. So the best value of a row is finite
unless the row is broken (see FusedOps.draw).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_MAX_FLOAT = tl.constexpr(3.4028234663852886e38)
_INF_ORDERED = tl.constexpr(0x7F800000)  # the high half of +inf's candidate; -inf's is its ~


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x45D9F3B
    x = (x ^ (x >> 16)) * 0x45D9F3B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(id_C, key_0, key_1):
    """The contract's noise. tl.log is libdevice's, which is exact to an ulp near 1 too."""
    bits_C = _mix32(_mix32(id_C.to(tl.uint32) * 0x61C88647 + key_0) ^ key_1)
    uniform_C = ((bits_C >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform_C))


@triton.jit(do_not_specialize=["num_masks", "num_splits"])
def draw_split_kernel(
    logits, temperature, keys, mask_places, masks, candidates,
    num_masks, logits_stride, num_splits, split_size,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program finds the best of `split_size` logits of one row (a multiple of BLOCK).

    Without masks (`num_masks` 0) it reads neither `mask_places` nor `masks`.
    """
    row = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    lane_C = tl.arange(0, BLOCK)
    begin = split * split_size
    best_C = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id_C = begin + lane_C
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    heat = tl.load(temperature + row)
    key_0 = tl.load(keys + row * 2).to(tl.uint32)
    key_1 = tl.load(keys + row * 2 + 1).to(tl.uint32)
    place = tl.load(mask_places + row, mask=num_masks > 0, other=-1)
    masks += tl.maximum(place, 0) * ((VOCAB + 31) // 32)
    logits += row.to(tl.int64) * logits_stride
    end = tl.minimum(begin + split_size, VOCAB)
    id_C = begin + lane_C
    raw_C = tl.load(logits + id_C, mask=id_C < VOCAB, other=float("-inf"))
    for start in range(begin, end, BLOCK):
        value_C = raw_C.to(tl.float32)
        id_C = start + lane_C
        next_C = id_C + BLOCK  # loaded while this block is compared
        is_last = start + BLOCK >= end
        mask_C = (next_C < VOCAB) & (not is_last)
        raw_C = tl.load(logits + next_C, mask=mask_C, other=float("-inf"))
        if place >= 0:
            word_C = tl.load(masks + id_C // 32, mask=id_C < VOCAB, other=0)
            is_out_C = ((word_C >> (id_C % 32)) & 1) == 0
            value_C = tl.where(is_out_C & (value_C < float("inf")), float("-inf"), value_C)
        if heat > 0:
            drawn_C = value_C / heat + _gumbel(id_C, key_0, key_1)
            drawn_C = tl.minimum(drawn_C, _MAX_FLOAT)
            value_C = tl.where(value_C < float("inf"), drawn_C, value_C)
        value_C = tl.where(value_C < float("inf"), value_C, float("inf"))  # also a NaN
        better_C = value_C > best_C
        best_C = tl.where(better_C, value_C, best_C)
        best_id_C = tl.where(better_C, id_C, best_id_C)
    best_C = tl.where(best_C == 0, 0.0, best_C)  # -0 equals 0
    bits_C = best_C.to(tl.int32, bitcast=True)
    ordered_C = (bits_C ^ ((bits_C >> 31) & 0x7FFFFFFF)).to(tl.int64)
    candidate_C = (ordered_C << 32) | (0x7FFFFFFF - best_id_C).to(tl.int64)
    tl.store(candidates + row * num_splits + split, tl.max(candidate_C, axis=0))


@triton.jit(do_not_specialize=["num_splits"])
def draw_merge_kernel(candidates, sampled, num_splits, MAX_SPLITS: tl.constexpr, PDL: tl.constexpr):
    """Each program writes the token id of the best of one row's splits; -1 if it is not finite."""
    row = tl.program_id(0)
    split = tl.arange(0, MAX_SPLITS)
    mask = split < num_splits
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    candidate = tl.load(candidates + row * num_splits + split, mask=mask, other=-(1 << 63))
    best = tl.max(candidate, axis=0)
    ordered = best >> 32
    is_finite = (ordered < _INF_ORDERED) & (ordered > ~_INF_ORDERED)
    tl.store(sampled + row, tl.where(is_finite, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1))
