"""Device memory of plans: equal buffers that are used again without a new allocation."""

import torch


class PooledBuffer:
    """A buffer of a BufferPool. Dropping it returns `tensor`, uint8 [num_bytes], to the pool."""

    __slots__ = ("_free", "tensor")

    def __init__(self, tensor: torch.Tensor, free: list[torch.Tensor]) -> None:
        self.tensor = tensor
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.tensor)


class BufferPool:
    """Equal device buffers, one for each plan alive. The first is allocated at once.

    A returned buffer may still be read by work that is queued on the stream. The next owner's
    upload is queued behind that work on the same stream, so nothing waits.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._device = device
        self._num_buffers = 0
        self._free: list[torch.Tensor] = []
        self.take()  # allocates the first, and returns it at once

    @property
    def total_bytes(self) -> int:
        """Device memory of all buffers, in use or free."""
        return self._num_buffers * self.num_bytes

    def take(self) -> PooledBuffer:
        """Returns a buffer with unspecified contents. Allocates only if all are in use."""
        if self._free:
            return PooledBuffer(self._free.pop(), self._free)
        self._num_buffers += 1
        tensor = torch.zeros(self.num_bytes, dtype=torch.uint8, device=self._device)
        return PooledBuffer(tensor, self._free)
