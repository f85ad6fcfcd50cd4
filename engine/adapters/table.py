"""Holds the table of resident adapters of one worker, and groups the rows of a step by adapter."""

import numpy as np
import numpy.typing as npt
import torch

from loraplex.backends.lora.contract import LoRABatch, LoRATable
from loraplex.backends.lora.table_fields import make_fields
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.adapters.vocabulary.resident import ResidentVocabulary
from loraplex.memory.host.store import PackedAdapter


class AdapterTable:
    """The ranks, scales and places of resident adapters, on the device and in a copy on the host.

    The loader thread writes the table on the device, on the stream of the load. The thread that
    plans steps writes the copy on the host.

    Attributes:
        target: the sizes that adapters must fit.
        table: its tensors keep their addresses, so that CUDA graphs may hold them.
        vocabulary: changes of the embedding and the head; None: the target allows none.
    """

    def __init__(
        self, target: AdapterTarget, num_slots: int, device: torch.device, num_weighted: int = 0
    ) -> None:
        """`num_weighted` rows follow those of the slots, for WeightedRows."""
        self.target = target
        self.num_slots = num_slots
        self.vocabulary: ResidentVocabulary | None = None
        if target.vocabulary is not None:
            num_all = num_slots + num_weighted
            self.vocabulary = ResidentVocabulary(target.vocabulary, num_all, device)
        num_rows, sizes = num_slots + num_weighted, (target.num_layers, len(target.modules))
        # A row holds rank, a_start, b_start and the bits of scale, so one copy sends it to the
        # device.
        self._fields = make_fields(*sizes, num_rows, device)
        self._vectors = make_fields(*sizes, num_rows, device, num_fields=2)
        self._host_fields = torch.zeros(self._fields.shape, dtype=torch.int32)
        self._host_vectors = torch.zeros(self._vectors.shape, dtype=torch.int32)
        page_table = torch.zeros(num_rows, target.max_pages, dtype=torch.int32)
        self.table = LoRATable(
            page_table=page_table.clone().to(device),
            host_page_table=page_table,
            **_by_name(self._fields, ""),
            **_by_name(self._host_fields, "host_"),
            gain_start=self._vectors[0],
            shift_start=self._vectors[1],
            host_gain_start=self._host_vectors[0],
            host_shift_start=self._host_vectors[1],
            host_has_vectors=torch.zeros(num_rows, dtype=torch.bool),
        )

    def write_device(self, slot: int, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        """Write the row of `slot` on the device; on a GPU the copy is only enqueued.

        Args:
            page_ids: int32 [n] on the device: the pages with the adapter's weights.
        """
        for fields, row in (
            (self._fields, _pack_row(adapter)),
            (self._vectors, _pack_vectors(adapter)),
        ):
            source = row.pin_memory() if fields.is_cuda else row
            fields[..., slot].copy_(source, non_blocking=True)
        # Entries beyond the adapter's pages are never read.
        self.table.page_table[slot, : len(page_ids)].copy_(page_ids)

    def write_host(self, slot: int, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        """Write the row of `slot` in the host's copy; `page_ids` is int32 [n] on the CPU."""
        self._host_fields[..., slot] = _pack_row(adapter)
        self._host_vectors[..., slot] = _pack_vectors(adapter)
        self.table.host_has_vectors[slot] = adapter.has_vectors
        self.table.host_page_table[slot].zero_()
        self.table.host_page_table[slot, : len(page_ids)] = page_ids
        if self.vocabulary is not None:
            self.vocabulary.write(slot, adapter.vocabulary)

    def clear(self, slot: int) -> None:
        """Empty the row of `slot` in the host's copy, so that later steps may not name the slot.

        The row on the device stays, because steps in flight may read it.
        """
        self._host_fields[..., slot].zero_()
        self._host_vectors[..., slot].zero_()
        self.table.host_has_vectors[slot] = False
        self.table.host_page_table[slot].zero_()
        if self.vocabulary is not None:
            self.vocabulary.clear(slot)

    @staticmethod
    def check(table: LoRATable, slots: npt.NDArray[np.int32]) -> None:
        """Raise ValueError unless every slot holds an adapter.

        Otherwise the base model, or another adapter, would silently answer a request.
        """
        empty = slots[table.host_page_table.numpy()[slots, 0] == 0]  # page 0 belongs to no adapter
        if len(empty):
            raise ValueError(f"a step names adapter slots {empty.tolist()}, which are not loaded")


def _by_name(fields: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    rank, a_start, b_start, scale = fields
    return {
        f"{prefix}rank": rank,
        f"{prefix}a_start": a_start,
        f"{prefix}b_start": b_start,
        f"{prefix}scale": scale.view(torch.float32),
    }


def _pack_row(adapter: PackedAdapter) -> torch.Tensor:
    """Returns the row of an adapter, int32 [4, layers, modules]."""
    scale = adapter.scale.view(torch.int32)
    return torch.stack((adapter.rank, adapter.a_start, adapter.b_start, scale))


def _pack_vectors(adapter: PackedAdapter) -> torch.Tensor:
    """Returns the places of an adapter's vectors, int32 [2, layers, modules]."""
    return torch.stack((adapter.gain_start, adapter.shift_start))


def group_rows(
    adapter_slots: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int32],
    num_base: npt.NDArray[np.int32] | None = None,
) -> LoRABatch:
    """Group the tokens of a step by adapter.

    Args:
        adapter_slots: int32 [rows]; -1 is the base model.
        num_tokens: int32 [rows].
        num_base: int32 [rows], leading tokens of each row that are the base model's; None: none.
    """
    token_slots = np.repeat(adapter_slots, num_tokens)
    if num_base is not None:
        starts = np.cumsum(num_tokens) - num_tokens
        offsets = np.arange(len(token_slots)) - np.repeat(starts, num_tokens)
        token_slots[offsets < np.repeat(num_base, num_tokens)] = -1
    order = np.argsort(token_slots, kind="stable")
    token_order = order[np.searchsorted(token_slots[order], 0) :].astype(np.int32)
    sorted_slots = token_slots[token_order]
    starts = np.flatnonzero(np.diff(sorted_slots, prepend=-1))
    return LoRABatch(
        num_tokens=len(token_slots),
        token_order=token_order,
        segment_starts=np.append(starts, len(token_order)).astype(np.int32),
        segment_slots=sorted_slots[starts].astype(np.int32),
    )
