"""One sequence as the scheduler sees it, and what the scheduler reports about it."""

from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from loraplex.memory.accounting.kv_cache import BlockChain
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.worker_protocol import SamplingSpec, TokenLogprobs, int_array

FINISH_REASONS = ("stop", "length", "abort", "error")

Rank = tuple[float, int]
"""A place in an order: smaller goes first; the second part, the order of arrival, is unique."""


class RequestState(Enum):
    WAITING = "waiting"  # queued: never started, waiting for its adapter, or preempted
    RUNNING = "running"  # holds a slot and pages
    FINISHED = "finished"


class RequestRefused(Exception):  # noqa: N818
    """What was asked for cannot be done; `code` travels on the wire, the text names the mend."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: what was asked, then the scheduler's own state.

    The scheduler may be ahead of what it knows: `num_total` counts tokens that were sampled, or
    will be by a step in flight, `token_ids` holds those whose ids have come back.
    """

    request_id: Hashable
    prompt_token_ids: "array[int]"
    sampling: SamplingSpec
    adapter: str = ""  # registered name; empty: the base model
    salt: str = ""
    priority: int = 0  # lower is earlier
    use_prefix_cache: bool = True
    arrival: float = 0.0  # seconds by the scheduler's clock, set by Scheduler.add

    state: RequestState = field(default=RequestState.WAITING, init=False)
    order: int = field(default=0, init=False)  # of arrival, unique
    key: Rank = field(default=(0.0, 0), init=False)  # place in its flow, see Policy
    rank: Rank = field(default=(0.0, 0), init=False)  # place among the admitted ones
    flow: Hashable = field(default=None, init=False)  # the one it waits in
    admitted_at: float = field(default=-1.0, init=False)  # seconds; negative: not yet
    adapter_version: AdapterVersion | None = field(default=None, init=False)
    reserves_adapter: bool = field(default=False, init=False)
    parked_on: Hashable = field(default=None, init=False)  # see WaitingQueue
    was_prefetched: bool = field(default=False, init=False)  # its adapter was loaded ahead, once
    chain: BlockChain | None = field(default=None, init=False)

    token_ids: "array[int]" = field(default_factory=int_array, init=False)
    num_total: int = field(default=0, init=False)
    max_total: int = field(default=0, init=False)  # prompt and answer never grow past this
    stop_ids: frozenset[int] = field(default=frozenset(), init=False)

    slot: int = field(default=-1, init=False)
    run: int = field(default=0, init=False)  # changes whenever the request loses its pages
    num_scheduled: int = field(default=0, init=False)  # tokens fed by the steps planned so far
    num_registered: int = field(default=0, init=False)  # tokens in blocks that are cached
    capacity: int = field(default=0, init=False)  # tokens that its pages hold
    num_cached_tokens: int = field(default=-1, init=False)  # of the prompt, at first admission
    num_prompt_logprobs: int = field(default=1, init=False)  # next position to report
    first_token_at: float = field(default=-1.0, init=False)  # seconds; negative: not yet
    tier: str = field(default="", init=False)  # one of TIERS: whence its adapter had to come

    def __post_init__(self) -> None:
        self.token_ids = self.prompt_token_ids[:]
        self.num_total = len(self.token_ids)
        self.stop_ids = frozenset(self.sampling.stop_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def reads_prefix_cache(self) -> bool:
        """Prompt log-probabilities need every prompt position computed."""
        return self.use_prefix_cache and self.sampling.num_prompt_logprobs < 0

    @property
    def has_tokens_in_flight(self) -> bool:
        return self.num_total != len(self.token_ids)

    def finish_reason(self) -> str:
        """Why the request ends with its last known token; empty if it goes on.

        Workers mask stop tokens among the first `min_tokens`, so one there does not count.
        """
        num_tokens = len(self.token_ids)
        if (
            self.token_ids[-1] in self.stop_ids
            and num_tokens - len(self.prompt_token_ids) > self.sampling.min_tokens
        ):
            return "stop"
        return "length" if num_tokens >= self.max_total else ""


@dataclass(slots=True)
class RequestUpdate:
    """New tokens or the end of a request; the fields mean what SequenceOutput's mean."""

    request_id: Hashable
    token_ids: "array[int]" = field(default_factory=int_array)
    finish_reason: str = ""  # "", or one of FINISH_REASONS
    stop_token_id: int = -1
    error: str = ""
    error_code: str = ""
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
