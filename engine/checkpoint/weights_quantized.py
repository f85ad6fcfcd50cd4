"""Reads the weights of a quantized Hugging Face directory."""

import logging

import torch

from loraplex.engine.checkpoint.packed_integers import (
    COMPANIONS,
    PACKED_NAMES,
    dequantize,
    weight_shape,
)
from loraplex.engine.checkpoint.pieces import copy_pieces
from loraplex.engine.checkpoint.quantization import FP8_BLOCKS, Quantization
from loraplex.engine.checkpoint.weights_safetensors import SafetensorsSource
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.shard import Piece

logger = logging.getLogger("loraplex")

_FP8_COMPANIONS = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")
_KV_SCALES = ("k_scale", "v_scale", "kv_scale", "output_scale", "q_scale", "prob_output_scale")
"""Scales of calibrated K and V, which pages do not use."""


class Fp8Source:
    """Implements WeightSource for e4m3 weights.

    Weights with a scale for each channel or for the matrix are handed on as they are. Those with a
    scale for each block are dequantized, and rounded again by whoever keeps them in fp8. Inputs
    are rounded by token, whatever the checkpoint says about them.
    """

    def __init__(self, files: SafetensorsSource, quantization: Quantization) -> None:
        self._files = files
        self._block = quantization.block
        self._is_blocks = quantization.layout == FP8_BLOCKS
        self._shapes = {
            name: shape
            for name, shape in files.shapes().items()
            if name.rpartition(".")[2] not in (*_FP8_COMPANIONS, *_KV_SCALES)
        }

        rounded = [name for name in self._shapes if self._is_plain_projection(name)]
        if rounded:
            logger.warning(
                "%d projections that the checkpoint keeps in 16 bits are rounded to fp8 too: %s",
                len(rounded),
                ", ".join(rounded[:3]),
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def copy_to(self, name: str, target: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
        if not self._is_blocks or self._scale_name(name) is None:
            self._files.copy_to(name, target, pieces)
            return
        weight = self._files.tensor(name).to(target.device).float()
        scales = self._files.tensor(self._need_scale(name)).to(target.device).float()
        for dim, size in enumerate(self._block):
            scales = scales.repeat_interleave(size, dim=dim)
        weight *= scales[: weight.shape[0], : weight.shape[1]]
        copy_pieces(weight, target, pieces or _whole(weight))

    def scales(self, name: str, pieces: tuple[Piece, ...]) -> torch.Tensor | None:
        if self._is_blocks or not self._files.is_e4m3(name):
            return None
        rows = pieces[0] if pieces else Piece(0, *(self._shapes[name][0],) * 3)
        scales = self._files.tensor(self._need_scale(name)).float().reshape(-1, 1)
        scales = scales.expand(rows.total, 1)
        return scales[rows.start : rows.stop]

    def _is_plain_projection(self, name: str) -> bool:
        return name.endswith("_proj.weight") and not self._files.is_e4m3(name)

    def _need_scale(self, name: str) -> str:
        found = self._scale_name(name)
        if found is None:
            raise ConfigError(f"{name} is e4m3, but the checkpoint has no scale for it")
        return found

    def _scale_name(self, name: str) -> str | None:
        names = (f"{name}_scale", f"{name}_scale_inv")
        return next((found for found in names if found in self._files.shapes()), None)


class PackedSource:
    """Implements WeightSource for packed integers, which it dequantizes on the target's device.

    Every rank of a split model reads and unpacks whole tensors.
    """

    def __init__(self, files: SafetensorsSource, quantization: Quantization) -> None:
        self._files = files
        self._quantization = quantization
        self._packed_name = PACKED_NAMES[quantization.layout]
        companions = COMPANIONS[quantization.layout]
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in files.shapes().items():
            module, _, kind = name.rpartition(".")
            if kind == self._packed_name:
                self._shapes[f"{module}.weight"] = weight_shape(quantization, shape)
            elif kind not in companions:
                self._shapes[name] = shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def copy_to(self, name: str, target: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
        if name in self._files.shapes():
            self._files.copy_to(name, target, pieces)
            return
        module = name.removesuffix("weight")

        def read(kind: str) -> torch.Tensor | None:
            full = module + kind
            if full not in self._files.shapes():
                return None
            return self._files.tensor(full).to(target.device)

        try:
            weight = dequantize(self._quantization, read)
        except KeyError as error:
            raise ConfigError(f"{name}: the checkpoint has no {module}{error.args[0]}") from None
        copy_pieces(weight, target, pieces or _whole(weight))

    def scales(self, name: str, pieces: tuple[Piece, ...]) -> None:
        return None


def _whole(tensor: torch.Tensor) -> tuple[Piece, ...]:
    return tuple(Piece(0, size, size, size) for size in tensor.shape)
