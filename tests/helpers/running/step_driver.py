"""Drives a Worker by hand-made plans: a scheduler without policy, over shuffled pages."""

import random
from array import array
from dataclasses import dataclass, field
from typing import Any

from loraplex.scheduler.worker_protocol import (
    AdapterBinding,
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    NewRequest,
    PromptLogprobs,
    SamplingSpec,
    StepPlan,
    StepResult,
    TokenLogprobs,
    int_array,
)

GREEDY: dict[str, Any] = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "max_tokens": 16, "min_tokens": 0, "stop_token_ids": int_array(), "num_logprobs": -1,
    "num_prompt_logprobs": -1, "bias_token_ids": int_array(), "bias_values": array("f"),
}  # fmt: skip


@dataclass
class Sequence:
    prompt: list[int]
    adapter_slot: int = -1  # of its only adapter, if it has one
    sampling: dict[str, Any] = field(default_factory=dict)
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    slot: int = -1
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    bindings: list[AdapterBinding] = field(default_factory=list)  # in place of `adapter_slot`

    @property
    def all_bindings(self) -> list[AdapterBinding]:
        if self.adapter_slot < 0:
            return self.bindings
        return [AdapterBinding(self.adapter_slot)]

    @property
    def spec(self) -> SamplingSpec:
        return SamplingSpec(**{**GREEDY, **self.sampling})


class StepDriver:
    """Holds the free pages and slots of one worker."""

    def __init__(self, worker: Any, *, block_tokens: int, max_num_seqs: int, seed: int = 0) -> None:
        self.worker = worker
        self._block_tokens = block_tokens
        self._random = random.Random(seed)
        self._free_pages = list(range(1, worker.ready.num_pages))
        self._random.shuffle(self._free_pages)
        self._free_slots = list(range(max_num_seqs))
        self._random.shuffle(self._free_slots)
        self._freed: list[int] = []
        self._step_id = 0
        self._adapter_slots = 0

    def load(self, name: str, path: Any) -> int:
        """Inspect and load; returns the adapter slot."""
        self.worker.handle(InspectAdapter(name=name, path=str(path)))
        inspected = self.await_event(AdapterInspected)
        assert not inspected.error, inspected.error
        pages = self.take_pages(inspected.num_pages)
        slot, self._adapter_slots = self._adapter_slots, self._adapter_slots + 1
        self.worker.handle(LoadAdapter(slot, inspected.content_hash, str(path), int_array(pages)))
        loaded = self.await_event(AdapterLoaded)
        assert not loaded.error and loaded.adapter_slot == slot
        return slot

    def await_event(self, kind: type) -> Any:
        events = self.worker.events(20.0)
        assert len(events) == 1 and isinstance(events[0], kind), events
        return events[0]

    def take_pages(self, count: int) -> list[int]:
        return [self._free_pages.pop() for _ in range(count)]

    def run(
        self, sequences: list[Sequence], num_new: int, *, chunk: int = 64, preempt_every: int = 0
    ) -> None:
        """Run until each has `num_new` tokens.

        The newest is preempted after every `preempt_every` steps, at most 4 times.
        """
        num_steps = 0
        while any(len(seq.output) < num_new for seq in sequences):
            active = [seq for seq in sequences if len(seq.output) < num_new]
            self.step(active, chunk)
            num_steps += 1
            preempts = preempt_every and num_steps % preempt_every == 0
            for seq in active:
                is_victim = preempts and num_steps <= 4 * preempt_every and seq is active[-1]
                if is_victim or len(seq.output) == num_new:
                    self.free(seq)

    def free(self, seq: Sequence) -> None:
        self._freed.append(seq.slot)
        self._free_slots.append(seq.slot)
        self._free_pages += seq.pages
        seq.slot, seq.pages, seq.num_computed = -1, [], 0

    def step(self, active: list[Sequence], chunk: int) -> StepResult:
        """One plan over all of `active`, at most `chunk` tokens of each."""
        new, page_slots, page_ids, rows = [], [], [], []
        for seq in active:
            known = len(seq.prompt) + len(seq.output)
            count = min(chunk, known - seq.num_computed)
            needed = -(-(seq.num_computed + count) // self._block_tokens) - len(seq.pages)
            pages = self.take_pages(needed)
            seq.pages += pages
            if seq.slot < 0:
                seq.slot = self._free_slots.pop()
                new.append(
                    NewRequest(
                        slot=seq.slot,
                        token_ids=int_array(seq.prompt + seq.output),
                        num_prompt_tokens=len(seq.prompt),
                        page_ids=int_array(pages),
                        bindings=seq.all_bindings,
                        sampling=seq.spec,
                    )
                )
            else:
                page_slots += [seq.slot] * len(pages)
                page_ids += pages
            rows.append((seq, count, seq.num_computed + count == known))
        rows.sort(key=lambda row: row[1] > 1)
        plan = StepPlan(
            step_id=self._step_id,
            freed_slots=int_array(self._freed),
            new_requests=new,
            page_slots=int_array(page_slots),
            page_ids=int_array(page_ids),
            slots=int_array([seq.slot for seq, _, _ in rows]),
            positions=int_array([seq.num_computed for seq, _, _ in rows]),
            num_tokens=int_array([count for _, count, _ in rows]),
            samples=int_array([int(samples) for _, _, samples in rows]),
        )
        result, self._freed = self.send(plan), []
        self._take_result(rows, result)
        return result

    @property
    def next_step_id(self) -> int:
        return self._step_id

    def send(self, plan: StepPlan) -> StepResult:
        """Run a plan with the next step's id, and do nothing with the result but return it."""
        self.worker.handle(plan)
        result: StepResult = self.await_event(StepResult)
        assert result.step_id == self._step_id
        self._step_id += 1
        return result

    def _take_result(self, rows: list[tuple[Sequence, int, bool]], result: StepResult) -> None:
        ids = iter(zip(result.token_ids, result.logprobs or [None] * len(rows), strict=False))
        by_slot = {seq.slot: seq for seq, _, _ in rows}
        for prompt in result.prompt_logprobs:
            by_slot[prompt.slot].prompt_logprobs.append(prompt)
        for seq, count, samples in rows:
            seq.num_computed += count
            if samples:
                token, logprobs = next(ids)
                seq.output.append(token)
                seq.logprobs.append(logprobs)
        assert next(ids, None) is None or not result.token_ids
