"""Makes a request's outputs from the messages that the server sends for it."""

from dataclasses import dataclass, field, replace
from typing import Any

from loraplex.engine.frontend.sampling_params import RequestOutputKind
from loraplex.entrypoints.client.list_prefix import ListPrefix
from loraplex.entrypoints.client.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestOutput,
    RequestStateStats,
)

Message = dict[str, Any]


class OutputAssembler:
    """Takes the "output" messages of one request. Each message holds only what is new.

    A DELTA output holds what its message holds. A CUMULATIVE output holds everything so far; the
    outputs of a request share their growing lists, so that a message costs O(new tokens).
    """

    def __init__(
        self, request: RequestOutput, num_completions: int, kind: RequestOutputKind
    ) -> None:
        """`request` holds the fields that all outputs have in common."""
        self._request = request
        self._is_delta = kind is RequestOutputKind.DELTA
        self._completions = [
            _Completion(CompletionOutput(index, lora_request=request.lora_request))
            for index in range(num_completions)
        ]

    def add(self, message: Message) -> RequestOutput:
        """Returns the output for one message. Later messages do not change it."""
        request = self._request
        if "prompt_token_ids" in message:
            request.prompt_token_ids = message["prompt_token_ids"]
        if "prompt_logprobs" in message:
            request.prompt_logprobs = [
                None if entries is None else _position(entries)
                for entries in message["prompt_logprobs"]
            ]
        changed = [self._completions[entry["index"]] for entry in message["outputs"]]
        for completion, entry in zip(changed, message["outputs"], strict=True):
            completion.add(entry, is_delta=self._is_delta)
        output = replace(
            request,
            outputs=[c.output for c in (changed if self._is_delta else self._completions)],
            finished=message["finished"],
        )
        if output.finished:
            output.num_cached_tokens = message["usage"]["cached_tokens"]
            output.metrics = _metrics(message)
        if self._is_delta:
            request.prompt_logprobs = None
        return output


@dataclass(slots=True)
class _Completion:
    """Holds the latest output of one completion and the lists behind it."""

    output: CompletionOutput
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)

    def add(self, entry: Message, *, is_delta: bool) -> None:
        """Replaces `output` by one that takes in an entry of "outputs"."""
        text = entry["text"]
        if is_delta:
            self.token_ids, self.logprobs = [], []
        else:
            text = self.output.text + text
        self.token_ids += entry["token_ids"]
        logprob_sum = self.output.cumulative_logprob
        for entries in entry.get("logprobs", ()):
            self.logprobs.append(_position(entries))
            logprob_sum = (logprob_sum or 0.0) + entries[0][1]
        grows = not is_delta and entry["finish_reason"] is None
        logprobs = ListPrefix(self.logprobs) if grows else self.logprobs
        self.output = CompletionOutput(
            self.output.index,
            text,
            ListPrefix(self.token_ids) if grows else self.token_ids,
            logprob_sum,
            logprobs if "logprobs" in entry else None,
            entry["finish_reason"],
            entry["stop_reason"],
            self.output.lora_request,
        )


def _metrics(message: Message) -> RequestStateStats | None:
    """Returns the times of a request's last message; None if it was cancelled before it began."""
    times = message.get("times")
    if times is None:
        return None
    arrival = times["arrival_time"]
    queued, first, last = (times[name] for name in ("queued_s", "first_token_s", "last_token_s"))
    return RequestStateStats(
        num_generation_tokens=message["usage"]["completion_tokens"],
        arrival_time=arrival,
        queued_ts=arrival,
        scheduled_ts=0.0 if queued is None else arrival + queued,
        first_token_ts=0.0 if first is None else arrival + first,
        last_token_ts=0.0 if last is None else arrival + last,
        first_token_latency=first or 0.0,
    )


def _position(entries: list[list[Any]]) -> PositionLogprobs:
    return {token_id: Logprob(logprob, rank, text) for token_id, logprob, rank, text in entries}
