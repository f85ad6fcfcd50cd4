"""A step that the GPU may still be running, and its result."""

import time
from array import array
from dataclasses import dataclass, field

import torch

from loraplex.engine.worker.sampler import Logprobs
from loraplex.scheduler.worker_protocol import PromptLogprobs, StepResult, TokenLogprobs, int_array


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """Scores of consecutive prompt positions of one request."""

    slot: int
    first_position: int
    num_best: int
    scores: Logprobs


@dataclass(slots=True)
class StepOutput:
    """The results of a step on the device, for N rows that sampled."""

    token_ids: torch.Tensor | None = None  # int32 [N]; None: no row sampled
    scored_rows: list[tuple[int, int]] = field(default_factory=list)  # (sampled row, num_best)
    scores: Logprobs | None = None  # of scored_rows, for the largest num_best
    prompts: list[ScoredPrompt] = field(default_factory=list)


class PendingStep:
    """A launched step. `result` waits for it."""

    def __init__(
        self, step_id: int, device: torch.device, previous: "PendingStep | None" = None
    ) -> None:
        """`previous` is the step launched before; the GPU's idle time between them is measured."""
        self._step_id = step_id
        self._is_cuda = device.type == "cuda"
        self._kernels = ""
        self._output = StepOutput()
        self._started_at = time.perf_counter()
        self._seconds = self._idle_seconds = 0.0
        if self._is_cuda:
            self._start = torch.cuda.Event(enable_timing=True)
            self._end: torch.cuda.Event = torch.cuda.Event(enable_timing=True)
            self._previous_end = previous._end if previous else None

    def start(self, kernels: str = "") -> None:
        """Mark the start: all work before the model's first kernel is enqueued.

        Args:
            kernels: see StepResult.kernels.
        """
        self._kernels = kernels
        if self._is_cuda:
            self._start.record()

    def finish(self, output: StepOutput) -> None:
        """Enqueue the copy of the results to the host, after everything enqueued so far."""
        if output.token_ids is not None:
            output.token_ids = self._to_host(output.token_ids)
        if output.scores is not None:
            output.scores = self._scores_to_host(output.scores)
        output.prompts = [
            ScoredPrompt(
                prompt.slot,
                prompt.first_position,
                prompt.num_best,
                self._scores_to_host(prompt.scores),
            )
            for prompt in output.prompts
        ]
        self._output = output
        if self._is_cuda:
            self._end.record()
        else:
            self._seconds = time.perf_counter() - self._started_at

    def result(self) -> StepResult:
        if self._is_cuda:
            self._end.synchronize()
            self._seconds = self._start.elapsed_time(self._end) / 1e3
            if self._previous_end is not None:
                self._idle_seconds = self._previous_end.elapsed_time(self._start) / 1e3
                self._previous_end = None
        output = self._output
        ids = [] if output.token_ids is None else output.token_ids.tolist()
        logprobs: list[TokenLogprobs | None] = []
        if output.scores is not None:
            logprobs = [None] * len(ids)
            for index, (row, num_best) in enumerate(output.scored_rows):
                logprobs[row] = _entry(output.scores, index, num_best)
        return StepResult(
            step_id=self._step_id,
            token_ids=int_array(ids),
            logprobs=logprobs,
            prompt_logprobs=[
                PromptLogprobs(
                    slot=prompt.slot,
                    first_position=prompt.first_position,
                    entries=[
                        _entry(prompt.scores, index, prompt.num_best)
                        for index in range(len(prompt.scores.ranks))
                    ],
                )
                for prompt in output.prompts
            ],
            step_us=int(self._seconds * 1e6),
            kernels=self._kernels,
            idle_us=int(self._idle_seconds * 1e6),
        )

    def _scores_to_host(self, scores: Logprobs) -> Logprobs:
        return Logprobs(
            self._to_host(scores.token_ids),
            self._to_host(scores.logprobs),
            self._to_host(scores.ranks),
        )

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._is_cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def _entry(scores: Logprobs, index: int, num_best: int) -> TokenLogprobs:
    """Returns the token itself, then its position's `num_best` best."""
    count = 1 + num_best
    ids = scores.token_ids[index, :count].tolist()
    return TokenLogprobs(
        token_ids=int_array(ids),
        logprobs=array("f", scores.logprobs[index, :count].tolist()),
        ranks=int_array([int(scores.ranks[index]), *range(1, len(ids))]),
    )
