"""An adapter's tensors in the layout of a safetensors file, ready to be sent."""

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from loraplex.engine.adapters.tensors.memory_file import MemoryFile

if TYPE_CHECKING:
    import torch

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_ALIGNMENT = 8


class SentTensors:
    """Tensors by name, as PEFT's get_peft_model_state_dict() returns them, on any device.

    The values are read by write() and frames(), not before.

    Attributes:
        num_bytes: size of the safetensors file.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """Takes tensors of torch or numpy.

        Raises:
            TypeError: a value is no tensor of floating-point numbers, or is spread over processes.
        """
        found = {str(name): _plain(str(name), tensor) for name, tensor in tensors.items()}
        self._tensors = dict(sorted(found.items(), key=lambda item: str(item[1].device)))
        self._head = _header(self._tensors)
        sizes = (tensor.numel() * tensor.itemsize for tensor in self._tensors.values())
        self.num_bytes = len(self._head) + sum(sizes)

    def write(self) -> MemoryFile:
        """Returns a sealed memory file, which the caller must close.

        Raises:
            OSError: there is not enough memory.
        """
        file = MemoryFile()
        try:
            os.ftruncate(file.fd, self.num_bytes)
            self._copy_to(mmap.mmap(file.fd, self.num_bytes))
            file.seal()
        except BaseException:
            file.close()
            raise
        return file

    def frames(self, max_bytes: int) -> list[memoryview]:
        """Returns the file in pieces of at most `max_bytes`. Tensors on the CPU are not copied."""
        pieces = [memoryview(self._head)]
        pieces += [host.numpy().data for host in self._on_host()]
        return [
            piece[start : start + max_bytes]
            for piece in pieces
            for start in range(0, len(piece), max_bytes)
        ]

    def _copy_to(self, mapping: mmap.mmap) -> None:
        import torch

        start = len(self._head)
        mapping[:start] = self._head
        target = torch.frombuffer(mapping, dtype=torch.uint8)
        for host in self._on_host():
            target[start : start + len(host)].copy_(host)
            start += len(host)

    def _on_host(self) -> "Iterator[torch.Tensor]":
        """Yields the bytes of the tensors in order, as uint8 on the CPU."""
        for device, group in groupby(self._tensors.values(), key=lambda tensor: tensor.device):
            parts = map(_bytes_of, group)
            if device.type == "cpu":
                yield from parts
            else:
                yield _download(list(parts))


def _download(parts: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """Copies byte tensors of one device to page-locked memory, by one transfer."""
    import torch

    joined = torch.cat(list(parts))
    host = torch.empty(len(joined), dtype=torch.uint8, pin_memory=joined.is_cuda)
    return host.copy_(joined)


def _bytes_of(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _plain(name: str, tensor: Any) -> "torch.Tensor":
    import torch

    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"tensor {name} is spread over processes: send its full_tensor()")
    if not isinstance(tensor, torch.Tensor):
        try:
            tensor = torch.as_tensor(tensor)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a tensor of torch or numpy: {error}") from None
    if str(tensor.dtype).removeprefix("torch.") not in _NAMES:
        raise TypeError(f"tensor {name} must hold floating-point numbers, got {tensor.dtype}")
    return tensor.detach()


def _header(tensors: "Mapping[str, torch.Tensor]") -> bytes:
    """Returns the length and the JSON text in front of the tensors."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        dtype = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
