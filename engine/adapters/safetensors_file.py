"""Reads tensors of a safetensors file into the caller's memory.

The file is read and never mapped: if someone truncates a mapped file, the process dies. The
safetensors library maps a file or reads all of it, so the header is parsed here. It is a JSON
map from a tensor's name to its type, shape and place. Files that the library refuses are refused.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.adapters.open_file import open_regular_file

MAX_HEADER_BYTES = 16 << 20
ByteArray = npt.NDArray[np.uint8]

_LENGTH_BYTES = 8
_MAX_VIEWS = 1024  # arrays in one preadv

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class DamagedFileError(ValueError):
    """The file is damaged; the safetensors library would refuse it, too."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The type, the shape and the place of a tensor; `start` is an offset in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """An open file; several threads may `read` at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.status = os.fstat(descriptor)

    def read_header(self) -> bytes:
        """Returns the JSON text for parse_header. Raises DamagedFileError."""
        length_bytes = os.pread(self._descriptor, _LENGTH_BYTES, 0)
        length = int.from_bytes(length_bytes, "little")
        if len(length_bytes) < _LENGTH_BYTES or _LENGTH_BYTES + length > self.status.st_size:
            raise DamagedFileError("its header is not whole")
        if length > MAX_HEADER_BYTES:
            raise DamagedFileError(f"its header is larger than {MAX_HEADER_BYTES} bytes")
        return os.pread(self._descriptor, length, _LENGTH_BYTES)

    def read(self, targets: Iterable[tuple[TensorPlace, ByteArray]]) -> None:
        """Fill each array with the bytes of its tensor.

        Neighbouring tensors are read by one call, wherever their arrays are.

        Args:
            targets: contiguous uint8 arrays, each as long as its tensor.

        Raises:
            DamagedFileError: the file ends too early.
        """
        views: list[memoryview] = []
        start = end = 0
        for place, array in sorted(targets, key=lambda target: target[0].start):
            if views and (place.start != end or len(views) == _MAX_VIEWS):
                self._fill(views, start)
                views = []
            if not views:
                start = end = place.start
            views.append(array.data)
            end += place.num_bytes
        self._fill(views, start)

    def stamp(self) -> tuple[int, ...]:
        """Returns stamp() of the file as it is now."""
        return stamp(os.fstat(self._descriptor))

    def _fill(self, views: list[memoryview], start: int) -> None:
        while views:
            count = os.preadv(self._descriptor, views, start)
            if not count:
                raise DamagedFileError("it was truncated while it was being read")
            start += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]


@contextmanager
def open_safetensors(path: Path, root: str = "") -> Iterator[SafetensorsFile]:
    """Opens a file; see open_regular_file for `root` and the errors."""
    with open_regular_file(path, root) as descriptor:
        yield SafetensorsFile(descriptor)


def parse_header(text: bytes, file_bytes: int) -> dict[str, TensorPlace]:
    """Returns the tensors by name, for a file of `file_bytes` bytes. Raises DamagedFileError."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedFileError("its header is no JSON") from None
    if not isinstance(header, dict):
        raise DamagedFileError("its header is no map")
    header.pop("__metadata__", None)
    end = data_start = _LENGTH_BYTES + len(text)
    places = {name: _parse(name, entry, data_start) for name, entry in header.items()}
    for place in sorted(places.values(), key=lambda place: (place.start, place.num_bytes)):
        if place.start != end:
            raise DamagedFileError("its tensors overlap or leave holes")
        end += place.num_bytes
    if end != file_bytes:
        raise DamagedFileError(f"it has {file_bytes} bytes, its header says {end}")
    return places


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """Returns a value that changes when the file is replaced or written.

    A program can set mtime back, but not ctime.
    """
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def _parse(name: str, entry: Any, data_start: int) -> TensorPlace:
    try:
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        begin, end = entry["data_offsets"]
        numbers = (begin, end, *shape)
        if set(map(type, numbers)) != {int} or min(numbers) < 0:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise DamagedFileError(f"its header is wrong about tensor {name}") from None
    if dtype is None:
        raise DamagedFileError(f"tensor {name} is of a type that is not known")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise DamagedFileError(f"tensor {name} has not the bytes of its shape")
    return TensorPlace(dtype, tuple(shape), data_start + begin, end - begin)
