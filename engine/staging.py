"""One copy to the GPU for everything that a step needs, from pinned memory and without a sync."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGN = 8
_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


class StepStaging:
    """A ring of pinned buffers. On a CPU the arrays themselves become the tensors.

    A buffer is written again only once its last copy is done, which with `depth` of them is
    a wait in the rarest case: a step that is `depth` steps old.
    """

    def __init__(self, device: torch.device, depth: int = 4) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * depth
        self._copied: list[torch.cuda.Event | None] = [None] * depth
        self._next = 0

    def upload(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
        """The arrays on the device, by name, as views of one tensor."""
        if self._device.type != "cuda":
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        end, places = 0, {}
        for name, array in arrays.items():
            places[name] = slice(end, end + array.nbytes)
            end += -(-array.nbytes // _ALIGN) * _ALIGN
        buffer = self._take_buffer(end)
        host = buffer.numpy()
        for name, array in arrays.items():
            host[places[name]] = array.reshape(-1).view(np.uint8)
        device_bytes = buffer[:end].to(self._device, non_blocking=True)
        self._mark_copied()
        return {
            name: device_bytes[places[name]].view(_DTYPES[array.dtype.name]).view(array.shape)
            for name, array in arrays.items()
        }

    def _take_buffer(self, num_bytes: int) -> torch.Tensor:
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        if self._buffers[self._next].numel() < num_bytes:
            size = max(1 << 16, 2 * num_bytes)
            self._buffers[self._next] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffers[self._next]

    def _mark_copied(self) -> None:
        event = self._copied[self._next] or torch.cuda.Event()
        event.record()
        self._copied[self._next] = event
        self._next = (self._next + 1) % len(self._buffers)
