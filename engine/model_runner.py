"""Runs the steps that the scheduler plans. Nothing in `launch` waits for the GPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionOp
from loraplex.backends.lora.contract import LoRAOp, LoRATable
from loraplex.engine.adapter_table import RowGroups, group_rows
from loraplex.engine.forward_context import ForwardContext
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.pending_step import PendingStep, ScoredPrompt, StepOutput
from loraplex.engine.request_states import RequestStates
from loraplex.engine.sampler import Logprobs, SamplingBatch, sample, score
from loraplex.engine.staging import StepStaging
from loraplex.memory.pool import PagePool
from loraplex.scheduler.plan import StepPlan

Int32Array = npt.NDArray[np.int32]

PROMPT_SCORE_ROWS = 256
"""Prompt positions whose logits exist at one time."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """A step's rows on the CPU: B rows, T tokens, N rows that sample."""

    slots: Int32Array  # [B]
    positions: Int32Array  # [B]
    num_tokens: Int32Array  # [B]
    starts: npt.NDArray[np.int64]  # [B + 1], of each row's tokens
    sampling: npt.NDArray[np.int64]  # [N], which rows sample
    next_positions: Int32Array  # [N], where their tokens will stand


class ModelRunner:
    """Attributes: pool; states, what is remembered of each request.

    Args:
        attention, lora: made for the model's sizes and device.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        pool: PagePool,
        states: RequestStates,
        lora_table: LoRATable,
        lora: LoRAOp,
        attention: AttentionOp,
    ) -> None:
        self.states = states
        self._model = model
        self.pool = pool
        self._lora_table = lora_table
        self._lora = lora
        self._attention = attention
        self._device = model.device
        self._staging = StepStaging(model.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueue a step; on a CPU, compute it. The result comes from the PendingStep."""
        step = PendingStep(plan.step_id, self._device)
        deltas = self.states.apply(plan)
        rows = _make_rows(plan)
        groups = group_rows(self.states.adapter_slots[rows.slots], rows.num_tokens)
        sampled = rows.slots[rows.sampling]
        sampling = self.states.sampling.collect(sampled, rows.next_positions)
        tensors = self._staging.upload(
            {**deltas, **self._row_arrays(rows, groups), **_prefixed(sampling)}
        )
        self.states.write(tensors)
        if not len(rows.slots):
            step.finish(StepOutput())
            return step
        hidden = self._forward(rows, groups, tensors)
        output = StepOutput()
        if len(rows.sampling):
            batch = SamplingBatch(**{name: tensors[f"sampling.{name}"] for name in sampling})
            self._sample(rows, batch, hidden, tensors, output)
        self._score_prompts(rows, hidden, output)
        step.finish(output)
        return step

    def _row_arrays(self, rows: _Rows, groups: RowGroups) -> dict[str, npt.NDArray[Any]]:
        states, block = self.states, self.pool.shape.block_tokens
        row_of_token = np.repeat(np.arange(len(rows.slots)), rows.num_tokens)
        offsets = np.arange(rows.starts[-1]) - rows.starts[row_of_token]
        positions = rows.positions[row_of_token].astype(np.int64) + offsets
        slots = rows.slots[row_of_token].astype(np.int64)
        pages = states.host_page_table[slots, positions // block].astype(np.int64)
        width = states.token_ids.shape[1]
        sampled_slots = rows.slots[rows.sampling].astype(np.int64)
        return {
            "slots": rows.slots.astype(np.int64),
            "positions": positions,
            "token_places": slots * width + positions,
            "kv_rows": pages * (2 * block) + positions % block,
            "query_starts": rows.starts.astype(np.int32),
            "kv_lens": rows.positions + rows.num_tokens,
            "lora_slots": groups.token_slots,
            "lora_order": groups.token_order,
            "sample_rows": rows.starts[rows.sampling + 1] - 1,
            "sample_places": sampled_slots * width + rows.next_positions,
        }

    def _forward(
        self, rows: _Rows, groups: RowGroups, tensors: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states [T, hidden_size]."""
        kv_lens = rows.positions + rows.num_tokens
        num_pages = -(-int(kv_lens.max()) // self.pool.shape.block_tokens)
        batch = AttentionBatch(
            query_lens=tuple(rows.num_tokens.tolist()),
            kv_lens=tuple(kv_lens.tolist()),
            num_decodes=int(np.argmax(np.append(rows.num_tokens, 0) != 1)),
            query_starts=tensors["query_starts"],
            kv_lens_device=tensors["kv_lens"],
            page_table=self.states.page_table[:, :num_pages].index_select(0, tensors["slots"]),
            kv_rows=tensors["kv_rows"],
        )
        self._attention.plan(batch)
        lora_batch = groups.to_batch(tensors["lora_slots"], tensors["lora_order"])
        self._lora.plan(table=self._lora_table, batch=lora_batch)
        ctx = ForwardContext(
            positions=tensors["positions"],
            kv_rows=tensors["kv_rows"],
            pool=self.pool.pages,
            kv=self.pool.kv,
            attention=self._attention,
            lora=self._lora,
            lora_table=self._lora_table,
            lora_batch=lora_batch,
        )
        token_ids = self.states.token_ids.view(-1).index_select(0, tensors["token_places"])
        return self._model.forward(token_ids.long(), ctx)

    def _sample(
        self,
        rows: _Rows,
        batch: SamplingBatch,
        hidden: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        output: StepOutput,
    ) -> None:
        logits = self._model.logits(hidden.index_select(0, tensors["sample_rows"]))
        num_best = self.states.sampling.num_logprobs[rows.slots[rows.sampling]]
        wanted = np.flatnonzero(num_best >= 0)
        raw = logits.clone() if len(wanted) else logits
        longest = int(rows.next_positions.max())
        chosen = sample(logits, batch, self.states.token_ids, longest)
        self.states.token_ids.view(-1).index_copy_(0, tensors["sample_places"], chosen.int())
        output.token_ids = chosen.int()
        if len(wanted):
            output.scored_rows = [(int(row), int(num_best[row])) for row in wanted]
            output.scores = self._score_rows(raw, chosen, wanted, int(num_best.max()))

    def _score_rows(
        self, raw: torch.Tensor, chosen: torch.Tensor, wanted: npt.NDArray[np.int64], num_best: int
    ) -> Logprobs:
        if len(wanted) < len(chosen):
            index = self._staging.upload({"wanted": wanted})["wanted"]
            raw, chosen = raw.index_select(0, index), chosen.index_select(0, index)
        return score(raw, chosen, num_best)

    def _score_prompts(self, rows: _Rows, hidden: torch.Tensor, output: StepOutput) -> None:
        """Log-probabilities of the prompt tokens that follow the fed ones, where asked for."""
        sampling = self.states.sampling
        for row in np.flatnonzero(sampling.num_prompt_logprobs[rows.slots] >= 0).tolist():
            slot, first = int(rows.slots[row]), int(rows.positions[row]) + 1
            end = min(first + int(rows.num_tokens[row]), int(sampling.num_prompt_tokens[slot]))
            num_best = int(sampling.num_prompt_logprobs[slot])
            start = int(rows.starts[row])
            for at in range(first, end, PROMPT_SCORE_ROWS):
                stop = min(at + PROMPT_SCORE_ROWS, end)
                logits = self._model.logits(hidden[start + at - first : start + stop - first])
                targets = self.states.token_ids[slot, at:stop].long()
                scores = score(logits, targets, num_best)
                output.prompts.append(ScoredPrompt(slot, at, num_best, scores))


def _make_rows(plan: StepPlan) -> _Rows:
    slots, positions, num_tokens, samples = (
        np.array(values, dtype=np.int32)
        for values in (plan.slots, plan.positions, plan.num_tokens, plan.samples)
    )
    sampling = np.flatnonzero(samples)
    return _Rows(
        slots=slots,
        positions=positions,
        num_tokens=num_tokens,
        starts=np.concatenate(([0], np.cumsum(num_tokens, dtype=np.int64))).astype(np.int64),
        sampling=sampling,
        next_positions=(positions + num_tokens)[sampling],
    )


def _prefixed(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {f"sampling.{name}": array for name, array in arrays.items()}
