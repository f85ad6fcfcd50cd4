"""The table of resident adapters on one worker, and the grouping of a step's rows by adapter."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.backends.lora.contract import LoRABatch, LoRATable
from loraplex.engine.adapters import AdapterTarget
from loraplex.memory.adapter_layout import MODULES, num_pages
from loraplex.memory.host_store import PackedAdapter

_PER_MODULE = ("rank", "a_start", "b_start", "scale")


class AdapterTable:
    """Attributes: table, whose tensors keep their addresses for good."""

    def __init__(self, target: AdapterTarget, num_slots: int, device: torch.device) -> None:
        all_modules = {module: target.max_rank for module in range(len(MODULES))}
        max_pages = num_pages([all_modules], target.shapes, target.page_elems)
        per_module = (target.num_layers, len(MODULES), num_slots)
        host = {
            "page_table": torch.zeros(num_slots, max_pages, dtype=torch.int32),
            "rank": torch.zeros(per_module, dtype=torch.int32),
            "a_start": torch.zeros(per_module, dtype=torch.int32),
            "b_start": torch.zeros(per_module, dtype=torch.int32),
            "scale": torch.zeros(per_module, dtype=torch.float32),
        }
        self._device = device
        self.table = LoRATable(
            **{name: value.clone().to(device) for name, value in host.items()},
            **{f"host_{name}": value for name, value in host.items()},
        )

    @property
    def num_slots(self) -> int:
        return self.table.page_table.shape[0]

    def fill(self, slot: int, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        """Let `slot` mean `adapter`, whose weights are in `page_ids` (int32, on the CPU)."""
        self._write("page_table", slot, page_ids)
        for name in _PER_MODULE:
            self._write(name, slot, getattr(adapter, name))

    def clear(self, slot: int) -> None:
        """Rank 0 everywhere: a row that still named the slot would get nothing of anyone's."""
        for name in _PER_MODULE:
            self._write(name, slot, torch.zeros_like(getattr(self.table, f"host_{name}")[..., 0]))

    def _write(self, name: str, slot: int, value: torch.Tensor) -> None:
        device, host = getattr(self.table, name), getattr(self.table, f"host_{name}")
        if self._device.type == "cuda":
            value = value.pin_memory()
        if name == "page_table":
            host[slot].zero_()
            host[slot, : len(value)] = value
            # Entries beyond the adapter's pages are never read.
            device[slot, : len(value)].copy_(value, non_blocking=True)
        else:
            host[..., slot] = value
            device[..., slot].copy_(value, non_blocking=True)


@dataclass(frozen=True, slots=True)
class RowGroups:
    """A step's tokens by adapter, on the CPU; see LoRABatch."""

    token_slots: npt.NDArray[np.int32]
    token_order: npt.NDArray[np.int64]
    segment_starts: tuple[int, ...]
    segment_slots: tuple[int, ...]

    def to_batch(self, token_slots: torch.Tensor, token_order: torch.Tensor) -> LoRABatch:
        """With the two arrays, uploaded."""
        return LoRABatch(
            num_tokens=len(self.token_slots),
            token_slots=token_slots,
            token_order=token_order,
            segment_starts=self.segment_starts,
            segment_slots=self.segment_slots,
        )


def group_rows(
    adapter_slots: npt.NDArray[np.int32], num_tokens: npt.NDArray[np.int32]
) -> RowGroups:
    """Of each row of the step: its adapter slot (-1: base) and its number of tokens."""
    token_slots = np.repeat(adapter_slots, num_tokens).astype(np.int32)
    order = np.argsort(token_slots, kind="stable")
    token_order = order[np.searchsorted(token_slots[order], 0) :].astype(np.int64)
    sorted_slots = token_slots[token_order]
    starts = np.flatnonzero(np.diff(sorted_slots, prepend=-1))
    return RowGroups(
        token_slots=token_slots,
        token_order=token_order,
        segment_starts=(*starts.tolist(), len(token_order)),
        segment_slots=tuple(sorted_slots[starts].tolist()),
    )
