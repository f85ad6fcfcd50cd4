"""Many small arrays to the GPU in one copy, from pinned memory and without a sync."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGN = 16
"""Bytes at whose multiples each array starts."""

_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


class PinnedRing:
    """Page-locked buffers, handed out in turn; ordinary memory for a CPU.

    A buffer is handed out again only once the copy queued from it is done, which with `depth` of
    them is a wait in the rarest case: for a step that is `depth` steps old.
    """

    def __init__(self, device: torch.device, depth: int = 4) -> None:
        self._is_cuda = device.type == "cuda"
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * depth
        self._copied: list[torch.cuda.Event | None] = [None] * depth
        self._next = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next buffer, uint8 [num_bytes] or more."""
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
        """To be called once the copy from the buffer last taken is queued."""
        if self._is_cuda:
            event = self._copied[self._next] or torch.cuda.Event()
            event.record()
            self._copied[self._next] = event
        self._next = (self._next + 1) % len(self._buffers)


class Staging:
    """Uploads from a PinnedRing. On a CPU the arrays themselves become the tensors."""

    def __init__(self, device: torch.device, depth: int = 4) -> None:
        self._device = device
        self._ring = PinnedRing(device, depth)

    def upload(
        self, arrays: Mapping[str, npt.NDArray[Any]], out: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The arrays on the device, by name, as views of one tensor.

        Args:
            arrays: C-contiguous int32, int64 or float32.
            out: uint8, the tensor to fill from its start, array after array, each at the next
                multiple of ALIGN bytes; None: a new one.

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
