"""Uploads of many small arrays to the GPU in one copy, from page-locked memory, without a sync."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGN = 16
"""Bytes. Each array starts at a multiple of it."""

_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


class PinnedRing:
    """`depth` page-locked buffers, used in turn; ordinary memory when the device is a CPU.

    A buffer is used again only after the copy queued from it is done. `take` waits for that copy,
    which is `depth` takes old, so in practice it does not wait.
    """

    def __init__(self, device: torch.device, depth: int = 4) -> None:
        self._is_cuda = device.type == "cuda"
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * depth
        self._copied: list[torch.cuda.Event | None] = [None] * depth
        self._next = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Returns the next buffer, uint8 [at least num_bytes]."""
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        if self._buffers[self._next].numel() < num_bytes:
            size = max(1 << 16, 2 * num_bytes)
            self._buffers[self._next] = torch.empty(
                size, dtype=torch.uint8, pin_memory=self._is_cuda
            )
        return self._buffers[self._next]

    def mark_copied(self) -> None:
        """Call this after the copy from the last taken buffer is queued."""
        if self._is_cuda:
            event = self._copied[self._next] or torch.cuda.Event()
            event.record()
            self._copied[self._next] = event
        self._next = (self._next + 1) % len(self._buffers)


class Uploader:
    """Uploads through a PinnedRing. On a CPU the returned tensors share memory with the arrays,
    unless `out` is given."""

    def __init__(self, device: torch.device, depth: int = 4) -> None:
        self._device = device
        self._ring = PinnedRing(device, depth)

    def upload(
        self, arrays: Mapping[str, npt.NDArray[Any]], out: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the arrays on the device, by name, as views of one tensor.

        Args:
            arrays: C-contiguous int32, int64 or float32, any shape.
            out: uint8 [bytes], filled from its start, one array after another, each at the next
                multiple of ALIGN. None allocates a new tensor.

        Raises:
            ValueError: `out` is too small.
        """
        end, places = 0, {}
        for name, array in arrays.items():
            places[name] = slice(end, end + array.nbytes)
            end += -(-array.nbytes // ALIGN) * ALIGN
        if out is not None and end > out.numel():
            raise ValueError(f"a step needs {end} bytes of metadata, its buffer has {out.numel()}")
        if self._device.type != "cuda" and out is None:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        buffer = self._ring.take(end)
        host = buffer.numpy()
        for name, array in arrays.items():
            host[places[name]] = array.reshape(-1).view(np.uint8)
        if out is None:
            out = torch.empty(end, dtype=torch.uint8, device=self._device)
        out[:end].copy_(buffer[:end], non_blocking=True)
        self._ring.mark_copied()
        return {
            name: out[places[name]].view(_DTYPES[array.dtype.name]).view(array.shape)
            for name, array in arrays.items()
        }
