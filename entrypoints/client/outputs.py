"""The results of a request; the classes and their fields are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from loraplex.engine.errors import LoraplexError
from loraplex.entrypoints.client.lora_mix import LoRA


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position; `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Maps token ids to their log-probabilities, the sampled token first."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the n completions of a prompt.

    `text`, `token_ids` and `logprobs` hold everything generated so far, or with
    RequestOutputKind.DELTA what is new since the last output. The two sequences are lists once
    the completion has finished; before, they may be read-only views.
    """

    index: int
    text: str = ""
    token_ids: Sequence[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # sum over all sampled tokens so far, with logprobs
    logprobs: Sequence[PositionLogprobs] | None = None  # one entry per token id
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = None  # the stop string or stop token id; None for end of text
    lora_request: LoRA | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestStateStats:
    """When what happened to a request, by the frontend's clock, in seconds since 1970.

    A time is 0.0 where there was no token.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0  # it began to wait
    scheduled_ts: float = 0.0  # the first of its answers was admitted
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0  # seconds from arrival


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions.

    `outputs` holds all n completions, or with RequestOutputKind.DELTA those that have something
    new; `index` tells them apart. `prompt_logprobs` is in the first DELTA output alone.
    """

    request_id: str
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # None for the first token
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    lora_request: LoRA | None = None
    num_cached_tokens: int | None = None  # prompt tokens taken from the prefix cache
    metrics: RequestStateStats | None = field(default=None, compare=False)  # in the last output


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request that ended with an error; docs/reference/protocol.md lists the codes."""

    request_id: str
    error: LoraplexError


RequestResult = RequestOutput | RequestFailure
