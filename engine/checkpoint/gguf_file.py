"""Reads GGUF files: the header at once, tensors one by one from the mapped file.

The format is llama.cpp's (ggml/docs/gguf.md). The `gguf` package dequantizes. Its own reader makes
an object of every vocabulary entry, which takes seconds in each process; this one takes 0.1 s.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from loraplex.engine.errors import ConfigError

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Location of one tensor; `shape` is in torch's order, rows first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file.

    Attributes:
        metadata: maps keys to values; arrays are lists.
        tensors: maps names to GGUFTensor, in file order.

    Raises:
        ConfigError: the file is not GGUF of version 2 or 3, is cut short, or is one of many parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        if self._map[:4] != b"GGUF":
            raise ConfigError(f"{path} is not a GGUF file")
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
            raise ConfigError(f"{path}: damaged GGUF header ({error})") from None

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Returns a tensor as float32 in its torch shape.

        Args:
            rows, columns: selection of the first and the last axis, where there are two or more. No
                more is dequantized than the blocks that hold them.

        Raises:
            ConfigError: the tensor's type cannot be dequantized.
        """
        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        blocks = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block, block_bytes)
        if len(tensor.shape) == 1:
            return self._dequantize(tensor, blocks)
        start, stop, _ = columns.indices(tensor.shape[-1])
        first = start // block
        part = self._dequantize(tensor, blocks[rows, ..., first : -(-stop // block), :])
        return part[..., start - first * block : stop - first * block]

    def _dequantize(self, tensor: GGUFTensor, blocks: np.ndarray) -> np.ndarray:
        """Returns float32 [..., elements of a row] of the bytes [..., blocks of a row, bytes]."""
        rows = blocks.reshape(*blocks.shape[:-2], -1)
        try:
            return dequantize(rows, tensor.type)
        except NotImplementedError:
            raise ConfigError(
                f"{self.path}: tensor {tensor.name} has type {tensor.type.name}, which cannot be "
                "dequantized; convert the file to Q8_0, F16 or another common type"
            ) from None

    def _read_header(self) -> None:
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ConfigError(
                f"{self.path}: GGUF version {version} (or a big-endian file) is not supported; "
                "convert it to little-endian version 3"
            )
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        if self.metadata.get("split.count", 0) > 1:
            raise ConfigError(
                f"{self.path} is one part of {self.metadata['split.count']}; join them first "
                "(llama-gguf-split --merge)"
            )
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors = {entry[0]: self._place(entry, start) for entry in entries}

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"{name} has {num_dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dims))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _place(self, entry: tuple[str, tuple[int, ...], int, int], start: int) -> GGUFTensor:
        name, shape, type_id, offset = entry
        kind = GGMLQuantizationType(type_id)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} of shape {shape} is not made of {kind.name} blocks")
        num_bytes = math.prod(shape) // block * block_bytes
        if start + offset + num_bytes > len(self._map):
            raise ValueError(f"{name} lies past the end of the file")
        return GGUFTensor(name, shape, kind, start + offset, num_bytes)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._map, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        raw = self._map[self._at : self._at + length]
        if len(raw) != length:
            raise ValueError("a string lies past the end of the file")
        self._at += length
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("I"), self._scalar("Q")
        if item in _SCALARS:
            code = f"<{count}{_SCALARS[item]}"
            values = list(struct.unpack_from(code, self._map, self._at))
            self._at += struct.calcsize(code)
            return values
        if count > len(self._map):
            raise ValueError("an array lies past the end of the file")
        return [self._value(item) for _ in range(count)]
