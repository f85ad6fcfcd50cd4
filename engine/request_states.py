"""What a worker remembers of each running request, by slot, between steps."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.sampling_states import SamplingStates
from loraplex.scheduler.plan import NewRequest, StepPlan

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(slots=True)
class _Writes:
    """Scattered writes to one flat tensor: where and what."""

    index: list[npt.NDArray[np.int64]] = field(default_factory=list)
    value: list[npt.NDArray[np.int32]] = field(default_factory=list)

    def add(self, index: npt.NDArray[np.int64], value: npt.NDArray[np.int32]) -> None:
        self.index.append(index)
        self.value.append(value)

    def arrays(self, prefix: str) -> Arrays:
        if not self.index:
            return {}
        return {
            f"{prefix}_index": np.concatenate(self.index),
            f"{prefix}_value": np.concatenate(self.value),
        }


class RequestStates:
    """Attributes, S slots (device tensors keep their addresses for good):

    token_ids: int32 [S, max_model_len + 1], on the device alone: sampled ids never leave it.
    page_table: int32 [S, max_pages], entries beyond a request's pages are page 0.
    host_page_table: the same on the CPU, where rows of the pool are worked out; entries beyond
        a request's pages are stale.
    adapter_slots: int32 [S], -1 for the base model.
    sampling: the sampling parameters.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_tokens: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        max_pages = -(-(max_model_len + 1) // block_tokens)
        self.max_model_len = max_model_len
        self.token_ids = torch.zeros(
            max_num_seqs, max_model_len + 1, dtype=torch.int32, device=device
        )
        self.page_table = torch.zeros(max_num_seqs, max_pages, dtype=torch.int32, device=device)
        self.host_page_table = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self.adapter_slots = np.full(max_num_seqs, -1, dtype=np.int32)
        self.sampling = SamplingStates(max_num_seqs, vocab_size)
        self._num_pages = np.zeros(max_num_seqs, dtype=np.int32)

    @staticmethod
    def device_bytes(max_num_seqs: int, max_model_len: int, block_tokens: int) -> int:
        """What the device tensors take."""
        return 4 * max_num_seqs * (max_model_len + 2 + max_model_len // block_tokens)

    def apply(self, plan: StepPlan) -> Arrays:
        """Apply a plan's deltas on the CPU; returns what `write` needs, once on the device."""
        tokens, pages = _Writes(), _Writes()
        for slot in plan.freed_slots:
            self._num_pages[slot] = 0
            self.adapter_slots[slot] = -1
            self.sampling.clear(slot)
        for request in plan.new_requests:
            self._start(request, tokens, pages)
        self._append_pages(plan, pages)
        arrays = tokens.arrays("token") | pages.arrays("page")
        if plan.new_requests:
            slots = [request.slot for request in plan.new_requests]
            arrays["new_slots"] = np.array(slots, dtype=np.int64)
        return arrays

    def write(self, arrays: dict[str, torch.Tensor]) -> None:
        """The deltas of `apply`, on the device."""
        if "new_slots" in arrays:
            self.page_table.index_fill_(0, arrays["new_slots"], 0)
        if "token_index" in arrays:
            flat = self.token_ids.view(-1)
            flat.index_copy_(0, arrays["token_index"], arrays["token_value"])
        if "page_index" in arrays:
            flat = self.page_table.view(-1)
            flat.index_copy_(0, arrays["page_index"], arrays["page_value"])

    def _start(self, request: NewRequest, tokens: _Writes, pages: _Writes) -> None:
        slot, num_tokens = request.slot, len(request.token_ids)
        if num_tokens > self.max_model_len:
            raise ValueError(f"a request of {num_tokens} tokens, above {self.max_model_len}")
        first = slot * self.token_ids.shape[1]
        ids = np.array(request.token_ids, dtype=np.int32)
        tokens.add(np.arange(first, first + num_tokens, dtype=np.int64), ids)
        self._num_pages[slot] = 0
        self.adapter_slots[slot] = request.adapter_slot
        self.sampling.set(slot, request.sampling, request.num_prompt_tokens)
        page_ids = np.array(request.page_ids, dtype=np.int32)
        self._write_pages(np.full(len(page_ids), slot, dtype=np.int32), page_ids, pages)

    def _append_pages(self, plan: StepPlan, pages: _Writes) -> None:
        slots = np.array(plan.page_slots, dtype=np.int32)
        self._write_pages(slots, np.array(plan.page_ids, dtype=np.int32), pages)

    def _write_pages(
        self, slots: npt.NDArray[np.int32], page_ids: npt.NDArray[np.int32], pages: _Writes
    ) -> None:
        """Append page i to the request in slots[i]; a slot may come more than once."""
        if not len(slots):
            return
        order = np.argsort(slots, kind="stable")
        sorted_slots = slots[order]
        first = np.searchsorted(sorted_slots, sorted_slots, side="left")
        columns = np.empty(len(slots), dtype=np.int64)
        columns[order] = self._num_pages[sorted_slots] + np.arange(len(slots)) - first
        if columns.max() >= self.host_page_table.shape[1]:
            raise ValueError(f"a request of more than {self.host_page_table.shape[1]} pages")
        self.host_page_table[slots, columns] = page_ids
        np.add.at(self._num_pages, slots, 1)
        pages.add(slots.astype(np.int64) * self.host_page_table.shape[1] + columns, page_ids)
