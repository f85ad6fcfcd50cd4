"""Writes quantized checkpoints, an integer at a time, as the libraries that define them do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 16
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # whose integers lie in bits 0-3, 4-7, ... of a word

Tensors = dict[str, torch.Tensor]
Quantize = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def quantize_files(path: Path, layout: str) -> Tensors:
    """Replaces the projections in `path` by quantized ones, and says so in config.json.

    Returns:
        The numbers that the new files stand for, float32, by name.
    """
    file = path / "model.safetensors"
    weights, stored, meant = load_file(file), {}, {}
    for name, tensor in weights.items():
        if not name.endswith("_proj.weight"):
            stored[name] = meant[name] = tensor
            continue
        parts, meant[name] = LAYOUTS[layout][1](tensor)
        module = name.removesuffix("weight")
        stored |= {module + kind: part.contiguous() for kind, part in parts.items()}
    save_file(stored, file)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = LAYOUTS[layout][0]
    (path / "config.json").write_text(json.dumps(config))
    return meant


def _e4m3(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = _e4m3(weight, scale)
    extra = {"input_scale": torch.ones(1)}  # the input is rounded by token all the same
    return {"weight": values, "weight_scale": scale} | extra, values.float() * scale


def _matrix(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max() / 448
    values = _e4m3(weight, scale)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // GROUP), -(-columns // GROUP))
    values, meant = torch.zeros_like(weight).to(torch.float8_e4m3fn), torch.zeros_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * GROUP, (i + 1) * GROUP), slice(j * GROUP, (j + 1) * GROUP)
            scales[i, j] = weight[block].abs().max() / 448
            values[block] = _e4m3(weight[block], scales[i, j])
            meant[block] = values[block].float() * scales[i, j]
    return {"weight": values, "weight_scale_inv": scales}, meant


def _integers(
    weight: torch.Tensor, bits: int, order: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """Returns unsigned integers [n, k] and zeros [n, groups], scales [n, groups], and the weight.

    Args:
        order: the group of each column; None: neighbours.
    """
    top, columns = (1 << bits) - 1, weight.shape[1]
    group_of = torch.arange(columns) // GROUP if order is None else order
    groups = int(group_of.max()) + 1
    low, high = (
        torch.stack([f(weight[:, group_of == g], 1).values for g in range(groups)], 1)
        for f in (torch.min, torch.max)
    )
    scales = ((high - low) / top).half().float()
    zeros = (-low / scales).round().clamp(1, top)
    column_scales, column_zeros = scales[:, group_of], zeros[:, group_of]
    integers = (weight / column_scales + column_zeros).round().clamp(0, top)
    meant = (integers - column_zeros) * column_scales
    return integers.int().numpy(), zeros.int().numpy(), scales.half(), meant


def _pack(integers: np.ndarray, bits: int) -> torch.Tensor:
    """Packs the last axis, the first integer in the lowest bits; the rest of a word is 0."""
    per_word = 32 // bits
    words = np.zeros((*integers.shape[:-1], -(-integers.shape[-1] // per_word)), dtype=np.uint32)
    for i in range(integers.shape[-1]):
        words[..., i // per_word] |= integers[..., i].astype(np.uint32) << (bits * (i % per_word))
    return torch.from_numpy(words.view(np.int32))


def _compressed(bits: int, symmetric: bool) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        integers, zeros, scales, meant = _integers(weight, bits)
        middle = 1 << (bits - 1)
        parts = {"weight_shape": torch.tensor(weight.shape), "weight_scale": scales}
        if symmetric:
            wide = scales.float().repeat_interleave(GROUP, 1)
            meant = (torch.from_numpy(integers) - middle) * wide
        else:
            parts["weight_zero_point"] = _pack(zeros.T, bits).T
        return parts | {"weight_packed": _pack(integers, bits)}, meant

    return quantize


def _gptq(bits: int, less: int, shuffled: bool) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)) // GROUP
        order = order if shuffled else torch.arange(columns) // GROUP
        integers, zeros, scales, meant = _integers(weight, bits, order)
        return {
            "qweight": _pack(integers, bits).T,
            "qzeros": _pack(zeros.T - less, bits),
            "scales": scales.T,
            "g_idx": order.int(),
        }, meant

    return quantize


def _awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    integers, zeros, scales, meant = _integers(weight, 4)

    def interleaved(rows: np.ndarray) -> torch.Tensor:
        by_word = rows.reshape(len(rows), -1, 8)[:, :, list(_AWQ_COLUMNS)]
        return _pack(by_word.reshape(rows.shape), 4)

    return {
        "qweight": interleaved(integers.T),
        "qzeros": interleaved(zeros.T),
        "scales": scales.T,
    }, meant


def _compressed_config(kind: str, bits: int, strategy: str, file_format: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "block_structure": None}
    return {
        "quant_method": "compressed-tensors",
        "format": file_format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


LAYOUTS: dict[str, tuple[dict[str, Any], Quantize]] = {
    "compressed-fp8-channel": (
        _compressed_config("float", 8, "channel", "float-quantized"), _channels
    ),
    "compressed-fp8-tensor": (_compressed_config("float", 8, "tensor", "float-quantized"), _matrix),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, _matrix),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, _blocks),
    "compressed-int4": (
        _compressed_config("int", 4, "group", "pack-quantized"), _compressed(4, symmetric=True)
    ),
    "compressed-int8-zeros": (
        _compressed_config("int", 8, "group", "pack-quantized"), _compressed(8, symmetric=False)
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, _gptq(4, 1, False)),
    "gptq-shuffled": (
        {"quant_method": "gptq", "bits": 8, "desc_act": True}, _gptq(8, 1, shuffled=True)
    ),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, _gptq(4, 0, False)
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, _awq),
}  # fmt: skip
