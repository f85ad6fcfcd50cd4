"""Unpacks weights of 4 or 8-bit integers: formats of compressed-tensors, GPTQ and AWQ.

Each word of 32 bits holds 32 / bits integers, the first one in the lowest bits. In all formats

    W[n, k] = (integer[n, k] - zero[n, group of k]) * scale[n, group of k]
"""

from collections.abc import Callable

import torch

from loraplex.engine.checkpoint.quantization import AWQ, GPTQ, PACKED, Quantization

Read = Callable[[str], torch.Tensor | None]
"""Returns a tensor of a module by its last name, on the device that computes; None: absent."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Place among 8 neighbouring outputs of the integer in each 4 bits of a word of AWQ."""

PACKED_NAMES = {PACKED: "weight_packed", GPTQ: "qweight", AWQ: "qweight"}
COMPANIONS = {
    PACKED: ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    GPTQ: ("qzeros", "scales", "g_idx"),
    AWQ: ("qzeros", "scales"),
}
"""Names of the tensors beside a packed one."""


def weight_shape(quantization: Quantization, packed: tuple[int, ...]) -> tuple[int, int]:
    """Returns (out_features, in_features) of a packed tensor of this shape."""
    per_word = 32 // quantization.bits
    rows, columns = packed
    match quantization.layout:
        case "gptq":
            return columns, rows * per_word
        case "awq":
            return columns * per_word, rows
        case _:
            return rows, columns * per_word


def dequantize(quantization: Quantization, read: Read) -> torch.Tensor:
    """Returns a weight, float32 [out_features, in_features].

    Raises:
        KeyError: a tensor is missing.
    """
    match quantization.layout:
        case "gptq":
            return _gptq(quantization, read)
        case "awq":
            return _awq(quantization, read)
        case _:
            return _compressed(quantization, read)


def _compressed(quantization: Quantization, read: Read) -> torch.Tensor:
    bits = quantization.bits
    integers = _unpack(_need(read, "weight_packed"), bits, dim=1)
    scales = _need(read, "weight_scale").float()
    packed_zeros = read("weight_zero_point")
    if packed_zeros is None:
        zeros = torch.full_like(scales, 1 << (bits - 1))
    else:
        zeros = _unpack(packed_zeros, bits, dim=0)[: len(scales)]
    return _scaled(integers, scales, zeros, read("weight_g_idx"))


def _gptq(quantization: Quantization, read: Read) -> torch.Tensor:
    bits = quantization.bits
    integers = _unpack(_need(read, "qweight"), bits, dim=0).t()
    zeros = _unpack(_need(read, "qzeros"), bits, dim=1) + quantization.zero_offset
    scales = _need(read, "scales").float()
    return _scaled(integers, scales.t(), zeros.t(), read("g_idx"))


def _awq(quantization: Quantization, read: Read) -> torch.Tensor:
    integers, zeros = (
        _in_order(_unpack(_need(read, name), quantization.bits, dim=1))
        for name in ("qweight", "qzeros")
    )
    scales = _need(read, "scales").float()
    return _scaled(integers.t(), scales.t(), zeros.t(), None)


def _in_order(columns: torch.Tensor) -> torch.Tensor:
    """Puts AWQ's interleaved columns in their order."""
    places = torch.tensor(AWQ_ORDER, device=columns.device).argsort()
    return columns.unflatten(1, (-1, 8))[:, :, places].flatten(1)


def _unpack(words: torch.Tensor, bits: int, *, dim: int) -> torch.Tensor:
    """Returns the unsigned integers of int32 [a, b], int32, 32 / bits as many along `dim`."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    shifts = shifts.view(1, -1, 1) if dim == 0 else shifts.view(1, 1, -1)
    integers = (words.unsqueeze(dim + 1) >> shifts) & ((1 << bits) - 1)
    return integers.flatten(dim, dim + 1)


def _scaled(
    integers: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor | None,
) -> torch.Tensor:
    """Returns (integers - zeros) * scales.

    Args:
        integers: [n, k].
        scales, zeros: [n, groups].
        group_of: int32 [k], the group of each column; None: groups are equal stretches.
    """
    if group_of is None:
        size = integers.shape[1] // scales.shape[1]
        scales, zeros = (x.repeat_interleave(size, dim=1) for x in (scales, zeros))
    else:
        scales, zeros = (x.index_select(1, group_of.long()) for x in (scales, zeros))
    return (integers - zeros) * scales


def _need(read: Read, name: str) -> torch.Tensor:
    found = read(name)
    if found is None:
        raise KeyError(name)
    return found
