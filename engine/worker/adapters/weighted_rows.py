"""Table rows for adapters with a weight: the adapter's own row with another scale."""

from dataclasses import fields

import numpy as np
import numpy.typing as npt
import torch

from loraplex.backends.lora.contract import LoRATable


class WeightedRows:
    """Hands out the table rows after those of the adapter slots.

    Each row stands for one adapter slot with one weight. All fields are the slot's but the scale,
    which is multiplied by the weight. So kernels, plans and graphs know nothing of weights, and
    requests with the same adapter and weight share one row.

    A row is written when its first user acquires it. The slot keeps its adapter as long as the row
    has users. The device's row is written on the stream of the steps, so steps in flight read what
    was there before.
    """

    def __init__(self, table: LoRATable, first_row: int) -> None:
        """`table` has the slots' rows up to `first_row`."""
        self._table = table
        self._free = list(range(table.host_rank.shape[-1] - 1, first_row - 1, -1))
        self._rows: dict[tuple[int, float], int] = {}
        self._keys: dict[int, tuple[int, float]] = {}
        self._num_users: dict[int, int] = {}
        self._new: list[int] = []  # rows that are not written on the device yet

    def acquire(self, adapter_slot: int, weight: float) -> int:
        """Returns the row of a slot with this weight, and writes the host's copy if it is new."""
        if weight == 1:
            return adapter_slot
        key = adapter_slot, weight
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = self._free.pop()
            self._keys[row] = key
            self._num_users[row] = 0
            self._new.append(row)
            index, slot = torch.tensor([row]), torch.tensor([adapter_slot])
            _copy_rows(self._table, "host_", index, slot, torch.tensor([weight]))
        self._num_users[row] += 1
        return row

    def release(self, row: int) -> None:
        """Ends one use of a row. Does nothing for the row of an adapter slot."""
        if row not in self._keys:
            return
        self._num_users[row] -= 1
        if not self._num_users[row]:
            del self._rows[self._keys.pop(row)], self._num_users[row]
            self._free.append(row)

    def take_new(self) -> dict[str, npt.NDArray[np.generic]]:
        """Returns the arrays that `write` needs on the device; empty if no row is new."""
        rows = [row for row in self._new if row in self._keys]
        self._new.clear()
        if not rows:
            return {}
        slots, weights = zip(*(self._keys[row] for row in rows), strict=True)
        return {
            "weighted_row": np.array(rows, dtype=np.int64),
            "weighted_slot": np.array(slots, dtype=np.int64),
            "weight": np.array(weights, dtype=np.float32),
        }

    def write(self, arrays: dict[str, torch.Tensor]) -> None:
        """Writes the new rows on the device."""
        if "weight" in arrays:
            rows, slots = arrays["weighted_row"], arrays["weighted_slot"]
            _copy_rows(self._table, "", rows, slots, arrays["weight"])


def _copy_rows(
    table: LoRATable,
    prefix: str,
    rows: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Copies the slots' fields to `rows` on one side of the table, with weighted scales."""
    for field in fields(table):
        if field.name.startswith("host_") != (prefix == "host_"):
            continue
        values: torch.Tensor = getattr(table, field.name)
        name = field.name.removeprefix(prefix)
        axis = 0 if name == "page_table" else values.dim() - 1
        copied = values.index_select(axis, slots)
        values.index_copy_(axis, rows, copied * weights if name == "scale" else copied)
