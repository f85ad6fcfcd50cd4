"""Places of a decoder that tensors of a checkpoint are written to."""

from typing import Protocol

import torch

from loraplex.backends.linear.contract import Fill, LinearWeight


class WeightSlot(Protocol):
    """One tensor of a checkpoint, or the part that a worker rank holds of it.

    Attributes:
        nbytes: bytes that it takes on the device.
    """

    shape: tuple[int, ...]
    nbytes: int

    def write(self, fill: Fill, scales: torch.Tensor | None = None) -> None:
        """Writes the whole tensor; see LinearWeight.write."""
        ...

    def values(self) -> torch.Tensor:
        """Returns the numbers that the model computes with."""
        ...


class TensorSlot:
    """A tensor in the model's dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.nbytes = tensor.nbytes
        self._tensor = tensor

    def write(self, fill: Fill, scales: torch.Tensor | None = None) -> None:
        fill(self._tensor)
        if scales is not None:
            self._tensor *= scales.to(self._tensor.device)

    def values(self) -> torch.Tensor:
        return self._tensor


class RowsSlot:
    """Rows of a weight that the op ``linear`` owns."""

    def __init__(self, weight: LinearWeight, rows: slice) -> None:
        num_rows = rows.stop - rows.start
        self.shape: tuple[int, ...] = (num_rows, weight.shape[1])
        self.nbytes = weight.nbytes * num_rows // weight.shape[0]
        self._weight = weight
        self._rows = rows

    def write(self, fill: Fill, scales: torch.Tensor | None = None) -> None:
        self._weight.write(self._rows, fill, scales)

    def values(self) -> torch.Tensor:
        return self._weight.values(self._rows)
