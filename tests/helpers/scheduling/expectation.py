"""Expected outputs of one request that a scheduler has accepted."""

from dataclasses import dataclass, field

from loraplex.scheduler.frontend_protocol import SequenceOutput
from loraplex.scheduler.worker_protocol import SamplingSpec


@dataclass
class Expectation:
    """A request that was accepted, and what has come of it."""

    prompt: list[int]
    sampling: SamplingSpec
    path: str  # of its adapter when it was added; empty for the base
    token_ids: list[int] = field(default_factory=list)
    end: SequenceOutput | None = None
    aborted: bool = False
    num_logprobs: int = 0
    num_prompt_logprobs: int = 0
    num_cached_tokens: int = 0
