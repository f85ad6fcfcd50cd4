"""Runs the steps that the scheduler plans. `launch` never waits for the GPU."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.backends.attention.contract import (
    AttentionBatch,
    AttentionPlan,
    one_row_a_token,
)
from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.contract import LoRABatch, LoRAPlan, LoRATable, apply_lora
from loraplex.backends.lora.passes import LoRAPasses, LoRAPassesPlan
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.vocabulary.resident import ResidentVocabulary
from loraplex.engine.config import GraphConfig
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.forward_context import ForwardContext
from loraplex.engine.worker.adapters.vocabulary_rows import VocabularyReader, VocabularyRows
from loraplex.engine.worker.backends import WorkerBackends
from loraplex.engine.worker.graphs.capture import DeviceInputs, GraphRecorder, kind_of
from loraplex.engine.worker.graphs.decode import MAX_GRAPH_ROWS, DecodeGraphs
from loraplex.engine.worker.graphs.mixed import MixedGraphs
from loraplex.engine.worker.pending_step import PendingStep, ScoredPrompt, StepOutput
from loraplex.engine.worker.request_states import RequestStates
from loraplex.engine.worker.sampler import Logprobs, SamplingBatch, sample, score
from loraplex.engine.worker.step_rows import (
    StepRows,
    TokenInputs,
    make_rows,
    masks_by_row,
    token_inputs,
)
from loraplex.memory.device.pool import PagePool
from loraplex.scheduler.worker_protocol import StepPlan

MAX_REREAD_BYTES = 1 << 30
"""K and V that a decode graph may read again to verify drafts. Each draft is a row of the graph and
reads its request's whole context. The pieces of a mixed step read it once, but take the CPU longer
to launch."""

PROMPT_SCORE_ROWS = 256
"""Prompt positions whose logits are in memory at one time."""


class ModelRunner:
    """Runs steps on one device.

    After `capture_graphs`, a step of decode rows alone, with drafts or without, replays a CUDA
    graph, and another small step replays the pieces of one. Other steps, steps where a row has
    several adapters, and all steps on a CPU launch operator by operator.

    Attributes:
        pool: the page pool.
        states: the state of each running request.

    Args:
        backends: made for the model's sizes and device.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        pool: PagePool,
        states: RequestStates,
        lora_table: LoRATable,
        backends: WorkerBackends,
        vocabulary: ResidentVocabulary | None = None,
    ) -> None:
        self.states = states
        self.pool = pool
        self._model = model
        self._lora_table = lora_table
        self._lora = backends.lora
        self._lora_passes = LoRAPasses(backends.lora)
        self._attention = backends.attention
        self._fused = backends.fused
        self._device = model.device
        self._uploader = Uploader(model.device)
        self._decode_graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        self._last_step: PendingStep | None = None
        self._vocabulary: VocabularyReader | None = None
        if vocabulary is not None:
            self._vocabulary = VocabularyReader(pool.pages, lora_table, vocabulary)

    @torch.inference_mode()
    def capture_graphs(self, config: GraphConfig, max_num_tokens: int) -> str:
        """Capture the decode steps, then the pieces of mixed ones, within the configured bounds.

        Args:
            max_num_tokens: tokens of the largest step.

        Returns:
            A line that says what was captured, or why nothing was.
        """
        if config.enforce_eager:
            return "no CUDA graphs: enforce_eager is set"
        if not self._attention.supports_graphs:
            return f"no CUDA graphs: attention {self._attention.name!r} cannot be captured"
        max_rows = min(self.states.max_num_seqs, MAX_GRAPH_ROWS)
        self._decode_graphs = DecodeGraphs(
            forward=self._forward_decode,
            attention=self._attention,
            lora=self._lora,
            lora_table=self._lora_table,
            logits=torch.empty(
                max_rows, self._model.spec.vocab_size, dtype=self._model.dtype, device=self._device
            ),
        )
        self._mixed_graphs = MixedGraphs(
            model=self._model,
            make_context=self._make_context,
            token_ids=self.states.token_ids.view(-1),
            attention=self._attention,
            lora=self._lora,
            lora_table=self._lora_table,
            max_tokens=max_num_tokens,
        )
        recorder = GraphRecorder(self._device, config)
        decode = self._decode_graphs.capture(recorder)
        mixed = self._mixed_graphs.capture(recorder)
        self._decode_graphs.capture_rare(recorder)
        return f"captured {decode} and {mixed} {recorder.finish()}"

    @torch.inference_mode()
    def warm_up(self, rows: int, rank: int) -> None:
        """Launch the LoRA kernels of a prefill, so that those compiled on first use are ready.

        It needs no adapter. A backend without kernels of its own needs no warm-up.

        Args:
            rows: rows of the prefill, all of one adapter.
            rank: that adapter's rank.
        """
        if not self._lora.graph_kinds:
            return
        order = np.arange(rows, dtype=np.int32)
        batch = LoRABatch(
            rows, order, np.array([0, rows], dtype=np.int32), np.zeros(1, dtype=np.int32)
        )
        host_rank = self._lora_table.host_rank
        host_rank[..., 0] = rank  # on the device it stays 0, so nothing is read or added
        plan = self._lora.plan(table=self._lora_table, batch=batch)
        host_rank[..., 0] = 0
        for group in self._model.groups:
            x = torch.zeros(rows, group.in_features, dtype=self._model.dtype, device=self._device)
            y = x.new_zeros(rows, sum(group.out_features))
            apply_lora(self._lora, plan, y=y, x=x, pool=self.pool.pages, layer=0, group=group)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueue a step, or compute it on a CPU. The PendingStep gives the result."""
        step = self._last_step = PendingStep(plan.step_id, self._device, self._last_step)
        deltas, rows, output = self.states.apply(plan), make_rows(plan), StepOutput()
        sampling = self._collect_sampling(rows, plan)
        tensors = self._uploader.upload({**deltas, **sampling})
        self.states.write(tensors)
        if len(rows.slots):
            self._run(step, rows, {name: tensors[name] for name in sampling}, output)
        else:
            step.start()
        step.finish(output)
        return step

    def _collect_sampling(self, rows: StepRows, plan: StepPlan) -> dict[str, npt.NDArray[Any]]:
        if not len(rows.sampling):
            return {}
        slots = rows.slots[rows.sampling]
        places = slots.astype(np.int64) * self.states.token_ids.shape[1] + rows.next_positions
        arrays = self.states.sampling.collect(
            slots, rows.next_positions, masks_by_row(rows, plan.masked_rows, plan.masks)
        )
        return {**arrays, "places": places, "rows": rows.sampled_after}

    def _run(
        self,
        step: PendingStep,
        rows: StepRows,
        sampling: dict[str, torch.Tensor],
        output: StepOutput,
    ) -> None:
        kv_lens, block = rows.kv_lens, self.pool.shape.block_tokens
        num_pages = -(-int(kv_lens.max()) // block)
        attention_batch = AttentionBatch(
            query_lens=rows.num_tokens,
            kv_lens=kv_lens,
            num_decodes=rows.num_decodes,
            page_table=self.states.page_table[rows.slots, :num_pages],
        )
        batches = self.states.adapter_batches(rows)
        for batch in batches:
            AdapterTable.check(self._lora_table, batch.segment_slots)
        inputs = token_inputs(
            rows,
            self.states.page_table,
            block_tokens=block,
            max_tokens=self.states.token_ids.shape[1],
        )
        lora_batch, decode, mixed = batches[0], self._decode_graphs, self._mixed_graphs
        vocabulary = self._vocabulary.plan(lora_batch, rows) if self._vocabulary else None
        if len(batches) > 1 or vocabulary is not None:
            decode = mixed = None
        kind = kind_of(self._lora, self._lora_table, lora_batch)
        num_tokens = len(inputs.places)
        reread_bytes = rows.num_reread * self.pool.shape.bytes_over_layers // block
        is_decode = rows.is_decode and reread_bytes <= MAX_REREAD_BYTES
        if decode and is_decode and (size := decode.fit(num_tokens, kind)):
            by_token = one_row_a_token(attention_batch)
            planned = decode.plan(size, kind, inputs, by_token, lora_batch)
            step.start(_describe("graph", planned.lora_plan))
            self._sample(rows, decode.replay(planned)[:num_tokens], sampling, output)
            return
        if mixed and (size := mixed.fit(num_tokens, kind)):
            planned = mixed.plan(size, kind, inputs, attention_batch, lora_batch)
            step.start(_describe("pieces", planned.lora_plan))
            hidden = mixed.replay(planned, num_tokens)
        else:
            of_tokens = vocabulary.tokens if vocabulary else None
            hidden = self._run_eagerly(step, inputs, attention_batch, batches, of_tokens)
        if len(rows.sampling):
            fed, of_samples = sampling["rows"], vocabulary.samples if vocabulary else None
            logits = self._model.logits(hidden.index_select(0, fed), change=of_samples)
            self._sample(rows, logits, sampling, output)
        self._score_prompts(rows, hidden, output)

    def _run_eagerly(
        self,
        step: PendingStep,
        inputs: TokenInputs,
        attention_batch: AttentionBatch,
        lora_batches: list[LoRABatch],
        vocabulary: VocabularyRows | None,
    ) -> torch.Tensor:
        """Launch operator by operator. Returns hidden states [T, hidden_size]."""
        tensors = self._uploader.upload(
            {"places": inputs.places, "positions": inputs.positions, "kv_rows": inputs.kv_rows}
        )
        attention_plan = self._attention.plan(attention_batch)
        lora_plan: LoRAPlan | None = None
        if len(lora_batches) > 1:
            lora_plan = self._lora_passes.plan(table=self._lora_table, batches=lora_batches)
        elif not lora_batches[0].is_empty:
            lora_plan = self._lora.plan(table=self._lora_table, batch=lora_batches[0])
        step.start(_describe("eager", lora_plan))
        return self._forward(DeviceInputs(**tensors), attention_plan, lora_plan, vocabulary)

    def _make_context(
        self,
        inputs: DeviceInputs,
        attention_plan: AttentionPlan | None,
        lora_plan: LoRAPlan | None,
        vocabulary: VocabularyRows | None = None,
    ) -> ForwardContext:
        return ForwardContext(
            positions=inputs.positions,
            kv_rows=inputs.kv_rows,
            pool=self.pool.pages,
            kv=self.pool.kv,
            attention=self._attention,
            attention_plan=attention_plan,
            fused=self._fused,
            lora=self._lora_passes if isinstance(lora_plan, LoRAPassesPlan) else self._lora,
            lora_plan=lora_plan,
            vocabulary=vocabulary,
        )

    def _forward(
        self,
        inputs: DeviceInputs,
        attention_plan: AttentionPlan,
        lora_plan: LoRAPlan | None,
        vocabulary: VocabularyRows | None = None,
    ) -> torch.Tensor:
        token_ids = self.states.token_ids.view(-1).index_select(0, inputs.places)
        ctx = self._make_context(inputs, attention_plan, lora_plan, vocabulary)
        return self._model.forward(token_ids, ctx)

    def _forward_decode(
        self,
        inputs: DeviceInputs,
        attention_plan: AttentionPlan,
        lora_plan: LoRAPlan | None,
        logits: torch.Tensor,
    ) -> None:
        self._model.logits(self._forward(inputs, attention_plan, lora_plan), out=logits)

    def _sample(
        self,
        rows: StepRows,
        logits: torch.Tensor,
        sampling: dict[str, torch.Tensor],
        output: StepOutput,
    ) -> None:
        places = sampling["places"]
        batch = SamplingBatch(**{k: v for k, v in sampling.items() if k not in ("places", "rows")})
        num_best = self.states.sampling.num_logprobs[rows.slots[rows.sampling]]
        wanted = np.flatnonzero(num_best >= 0)
        longest = int(rows.next_positions.max())
        sampled = sample(logits, batch, self.states.token_ids, longest, fused=self._fused)
        output.token_ids = sampled
        # Steps planned before the verdict is known still feed the token of a row that failed.
        known = sampled.clamp_min(0)
        self.states.token_ids.view(-1).index_copy_(0, places, known)
        if len(wanted):
            output.scored_rows = [(int(row), int(num_best[row])) for row in wanted]
            output.scores = self._score_rows(logits, known, wanted, int(num_best.max()))

    def _score_rows(
        self,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        wanted: npt.NDArray[np.int64],
        num_best: int,
    ) -> Logprobs:
        if len(wanted) < len(sampled):
            index = self._uploader.upload({"wanted": wanted})["wanted"]
            logits, sampled = logits.index_select(0, index), sampled.index_select(0, index)
        return score(logits, sampled, num_best)

    def _score_prompts(self, rows: StepRows, hidden: torch.Tensor, output: StepOutput) -> None:
        """Score the prompt tokens that follow the fed ones, for requests that ask for it."""
        sampling = self.states.sampling
        for row in np.flatnonzero(sampling.num_prompt_logprobs[rows.slots] >= 0).tolist():
            slot, first = int(rows.slots[row]), int(rows.positions[row]) + 1
            end = min(first + int(rows.num_tokens[row]), int(sampling.num_prompt_tokens[slot]))
            num_best = int(sampling.num_prompt_logprobs[slot])
            start = int(rows.starts[row])
            for at in range(first, end, PROMPT_SCORE_ROWS):
                stop = min(at + PROMPT_SCORE_ROWS, end)
                change = None
                if self._vocabulary is not None:
                    adapter = int(self.states.adapter_rows[slot, 0])
                    change = self._vocabulary.all_rows(adapter, stop - at)
                fed = hidden[start + at - first : start + stop - first]
                logits = self._model.logits(fed, change=change)
                targets = self.states.token_ids[slot, at:stop]
                scores = score(logits, targets, num_best)
                output.prompts.append(ScoredPrompt(slot, at, num_best, scores))


def _describe(how: str, lora_plan: LoRAPlan | None) -> str:
    """Returns StepResult.kernels."""
    return how if lora_plan is None else f"{how}+{lora_plan.family}"
