"""What a request gives back; the classes and their fields are vLLM's."""

from dataclasses import dataclass, field, replace

from loraplex.engine.errors import LoraplexError
from loraplex.entrypoints.client.lora_request import LoRARequest


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position; `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id -> its log-probability, the chosen token first."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the n answers to a prompt, as far as it has come."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # of the chosen tokens, when logprobs were asked for
    logprobs: list[PositionLogprobs] | None = None  # one entry per token id
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = None  # the stop string or stop token id; None for end of text
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and everything generated for it so far."""

    request_id: str
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # None for the first token
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    lora_request: LoRARequest | None = None
    num_cached_tokens: int | None = None  # prompt tokens taken from the prefix cache

    def snapshot(self) -> "RequestOutput":
        """A copy that later tokens do not change."""
        outputs = [
            replace(
                output,
                token_ids=list(output.token_ids),
                logprobs=None if output.logprobs is None else list(output.logprobs),
            )
            for output in self.outputs
        ]
        return replace(self, outputs=outputs)


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request that ended with an error; `error.code` is one of docs/protocol.md."""

    request_id: str
    error: LoraplexError
