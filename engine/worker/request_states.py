"""The state of each running request that a worker keeps between steps, by slot."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.worker.sampling_states import SamplingStates
from loraplex.scheduler.worker_protocol import NewRequest, StepPlan

Arrays = dict[str, npt.NDArray[Any]]


class RequestStates:
    """State of S slots. The device tensor never changes its address.

    Attributes:
        token_ids: int32 [S, max_model_len + 1], on the device; sampled ids are written there.
        page_table: int32 [S, max_pages], on the CPU; entries beyond a request's pages are stale.
        adapter_slots: int32 [S], on the CPU; -1 for the base model.
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
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.token_ids = torch.zeros(
            max_num_seqs, max_model_len + 1, dtype=torch.int32, device=device
        )
        self.page_table = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self.adapter_slots = np.full(max_num_seqs, -1, dtype=np.int32)
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
            self.adapter_slots[slot] = -1
            self.sampling.clear(slot)
        for request in plan.new_requests:
            self._start(request)
        self._append_pages(
            np.array(plan.page_slots, dtype=np.int32), np.array(plan.page_ids, dtype=np.int32)
        )
        if not plan.new_requests:
            return {}
        return {
            "token_index": np.concatenate([self._places(r) for r in plan.new_requests]),
            "token_value": np.concatenate(
                [np.array(r.token_ids, dtype=np.int32) for r in plan.new_requests]
            ),
        }

    def write(self, arrays: dict[str, torch.Tensor]) -> None:
        """Write the deltas of `apply` to the device tensor."""
        if "token_index" in arrays:
            flat = self.token_ids.view(-1)
            flat.index_copy_(0, arrays["token_index"], arrays["token_value"])

    def _start(self, request: NewRequest) -> None:
        slot, num_tokens = request.slot, len(request.token_ids)
        if num_tokens > self.max_model_len:
            raise ValueError(f"a request of {num_tokens} tokens, above {self.max_model_len}")
        self._num_pages[slot] = 0
        self.adapter_slots[slot] = request.adapter_slot
        self.sampling.set(slot, request.sampling, request.num_prompt_tokens)
        page_ids = np.array(request.page_ids, dtype=np.int32)
        self._append_pages(np.full(len(page_ids), slot, dtype=np.int32), page_ids)

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
