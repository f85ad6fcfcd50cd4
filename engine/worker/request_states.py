"""The state of each running request that a worker keeps between steps, by slot."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.backends.lora.contract import LoRABatch
from loraplex.engine.adapters.table import group_rows
from loraplex.engine.adapters.vocabulary.resident import ResidentVocabulary
from loraplex.engine.worker.adapters.weighted_rows import WeightedRows
from loraplex.engine.worker.sampling_states import SamplingStates
from loraplex.engine.worker.step_rows import StepRows, draft_places
from loraplex.scheduler.adapters.binding import MAX_BINDINGS
from loraplex.scheduler.worker_protocol import AdapterBinding, NewRequest, StepPlan

Arrays = dict[str, npt.NDArray[Any]]


class RequestStates:
    """State of S slots. The device tensor never changes its address.

    Attributes:
        token_ids: int32 [S, max_model_len + 1], on the device; sampled ids are written there.
        page_table: int32 [S, max_pages], on the CPU; entries beyond a request's pages are stale.
        num_bindings: int32 [S], on the CPU: how many adapters the request has; 0: the base model.
        adapter_rows: int32 [S, MAX_BINDINGS], on the CPU: their rows of the adapter table.
        first_positions: int32 [S, MAX_BINDINGS], on the CPU: from where on each applies.
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
        weighted_rows: WeightedRows | None = None,
        vocabulary: ResidentVocabulary | None = None,
    ) -> None:
        """Without `weighted_rows` every adapter has the weight 1, and without `vocabulary` the base
        model's tokens."""
        max_pages = -(-(max_model_len + 1) // block_tokens)
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.token_ids = torch.zeros(
            max_num_seqs, max_model_len + 1, dtype=torch.int32, device=device
        )
        self.page_table = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self.num_bindings = np.zeros(max_num_seqs, dtype=np.int32)
        self.adapter_rows = np.full((max_num_seqs, MAX_BINDINGS), -1, dtype=np.int32)
        self.first_positions = np.zeros((max_num_seqs, MAX_BINDINGS), dtype=np.int32)
        self._weighted_rows = weighted_rows
        self._vocabulary = vocabulary
        self.sampling = SamplingStates(max_num_seqs, vocab_size)
        self._num_pages = np.zeros(max_num_seqs, dtype=np.int32)

    @staticmethod
    def device_bytes(max_num_seqs: int, max_model_len: int) -> int:
        """Returns the bytes of the device tensor."""
        return 4 * max_num_seqs * (max_model_len + 1)

    def apply(self, plan: StepPlan) -> Arrays:
        """Apply a plan's deltas on the CPU. Returns the arrays that `write` needs on the device."""
        for slot in plan.freed_slots:
            self._num_pages[slot] = 0
            self._unbind(slot)
            self.sampling.clear(slot)
        for request in plan.new_requests:
            self._start(request)
        self._append_pages(
            np.array(plan.page_slots, dtype=np.int32), np.array(plan.page_ids, dtype=np.int32)
        )
        if not plan.new_requests and not plan.draft_ids:
            return {}
        weighted = self._weighted_rows.take_new() if self._weighted_rows else {}
        places = [self._places(request) for request in plan.new_requests]
        token_ids = [request.token_ids for request in plan.new_requests]
        if plan.draft_ids:
            places.append(draft_places(plan, self.token_ids.shape[1]))
            token_ids.append(plan.draft_ids)
        return {
            **weighted,
            "token_index": np.concatenate(places),
            "token_value": np.concatenate([np.array(ids, dtype=np.int32) for ids in token_ids]),
        }

    def adapter_batches(self, rows: StepRows) -> list[LoRABatch]:
        """Groups the rows of a step by adapter. Returns one batch or more.

        Batch k holds the k-th adapter of each row that has so many, from its first position on.
        Only a single batch may be empty.
        """
        num_batches = max(1, int(self.num_bindings[rows.slots].max()))
        batches = [self._group(rows, index) for index in range(num_batches)]
        return [batch for batch in batches if not batch.is_empty] or batches[:1]

    def _group(self, rows: StepRows, index: int) -> LoRABatch:
        first_positions = self.first_positions[rows.slots, index]
        num_base = None
        if first_positions.any():
            num_base = np.clip(first_positions - rows.positions, 0, rows.num_tokens)
        return group_rows(self.adapter_rows[rows.slots, index], rows.num_tokens, num_base)

    def write(self, arrays: dict[str, torch.Tensor]) -> None:
        """Write the deltas of `apply` to the device tensor and to the adapter table."""
        if "token_index" in arrays:
            flat = self.token_ids.view(-1)
            flat.index_copy_(0, arrays["token_index"], arrays["token_value"])
        if self._weighted_rows:
            self._weighted_rows.write(arrays)

    def _start(self, request: NewRequest) -> None:
        slot, num_tokens = request.slot, len(request.token_ids)
        if num_tokens > self.max_model_len:
            raise ValueError(f"a request of {num_tokens} tokens, above {self.max_model_len}")
        self._num_pages[slot] = 0
        self._bind(slot, request.bindings)
        vocab_size = None
        if self._vocabulary is not None:
            vocab_size = self._vocabulary.num_tokens(int(self.adapter_rows[slot, 0]))
        self.sampling.set(slot, request.sampling, request.num_prompt_tokens, vocab_size)
        page_ids = np.array(request.page_ids, dtype=np.int32)
        self._append_pages(np.full(len(page_ids), slot, dtype=np.int32), page_ids)

    def _bind(self, slot: int, bindings: list[AdapterBinding]) -> None:
        self._unbind(slot)
        self.num_bindings[slot] = len(bindings)
        for index, binding in enumerate(bindings):
            row = binding.adapter_slot
            if self._weighted_rows is not None:
                row = self._weighted_rows.acquire(row, binding.weight)
            elif binding.weight != 1:
                raise ValueError(f"weight {binding.weight} of an adapter, without weighted rows")
            self.adapter_rows[slot, index] = row
            self.first_positions[slot, index] = binding.first_position

    def _unbind(self, slot: int) -> None:
        for index in range(self.num_bindings[slot]):
            if self._weighted_rows is not None:
                self._weighted_rows.release(int(self.adapter_rows[slot, index]))
        self.num_bindings[slot] = 0
        self.adapter_rows[slot] = -1
        self.first_positions[slot] = 0

    def _places(self, request: NewRequest) -> npt.NDArray[np.int64]:
        """Returns the places of its tokens in `token_ids`, seen flat."""
        first = request.slot * self.token_ids.shape[1]
        return np.arange(first, first + len(request.token_ids), dtype=np.int64)

    def _append_pages(self, slots: npt.NDArray[np.int32], page_ids: npt.NDArray[np.int32]) -> None:
        """Append page i to the request in slots[i]. A slot may occur more than once."""
        if not len(slots):
            return
        order = np.argsort(slots, kind="stable")
        sorted_slots = slots[order]
        first = np.searchsorted(sorted_slots, sorted_slots, side="left")
        columns = np.empty(len(slots), dtype=np.int64)
        columns[order] = self._num_pages[sorted_slots] + np.arange(len(slots)) - first
        if columns.max() >= self.page_table.shape[1]:
            raise ValueError(f"a request of more than {self.page_table.shape[1]} pages")
        self.page_table[slots, columns] = page_ids
        np.add.at(self._num_pages, slots, 1)
