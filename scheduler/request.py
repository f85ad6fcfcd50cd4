"""One sequence as the scheduler sees it."""

from array import array
from collections.abc import Hashable
from enum import Enum
from typing import Protocol

import msgspec
from msgspec.structs import replace

from loraplex.memory.accounting.block_chain import BlockChain
from loraplex.scheduler.adapters.binding import Binding, distinct_versions
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.frontend_protocol import (
    AdapterVocabulary,
    AddRequest,
    OutputColumns,
    OutputTable,
)
from loraplex.scheduler.speculation.drafter import Drafter
from loraplex.scheduler.worker_protocol import int_array

FINISH_REASONS = ("stop", "length", "abort", "error")

Rank = tuple[float, ...]
"""A place in an order: smaller goes first; the last part, the order of arrival, is unique."""


class RequestState(Enum):
    WAITING = "waiting"  # queued: never started, waiting for its adapter, or preempted
    RUNNING = "running"  # holds a slot and pages
    FINISHED = "finished"


class Constraint(Protocol):
    """Follows one sequence and knows which tokens may come next.

    Attributes:
        mask: ``array("i")`` with a bit for each token, as StepPlan.masks has it. None while it is
            computed for the last known token; the sequence takes part in no step until then.
        draft_masks: the masks after each draft, as far as the grammar allows the drafts. They are
            there when `mask` is.
    """

    mask: "array[int] | None"
    draft_masks: "list[array[int]]"

    def advance(self, token_ids: "array[int]", drafts: "array[int]") -> None:
        """Take the next tokens. Returns at once; the masks follow.

        Args:
            drafts: what may come then; they are not taken.
        """
        ...


class RequestRefused(Exception):  # noqa: N818
    """The request or command cannot be carried out.

    `code` travels on the wire; `text` names the cause and the mend. `retry_after_s` says when the
    same may be accepted, 0 if that is not known. `vocabulary` is the one that the request needs, if
    it was encoded by another.
    """

    def __init__(
        self,
        code: str,
        text: str,
        *,
        retry_after_s: float = 0.0,
        vocabulary: AdapterVocabulary | None = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.retry_after_s = retry_after_s
        self.vocabulary = vocabulary


class Request(AddRequest, eq=False, tag=None):
    """One sequence: the fields of AddRequest, then the scheduler's own state.

    The scheduler may be ahead of the token ids it knows: `num_total` counts tokens that were
    sampled or will be by a step in flight, `token_ids` holds those whose ids have come back. A
    step that verifies drafts counts as one token, and what was accepted is added with its result.
    """

    frontend: Hashable = b""  # who asked; request ids are unique within a frontend
    uid: Hashable = None  # (frontend, request_id): unique among all unfinished requests
    requester: Hashable = None  # whose share of the queue it takes: a tenant, else a client, if any
    arrival: float = 0.0  # seconds by the scheduler's clock, set by Scheduler.add
    outputs: OutputColumns = msgspec.field(default_factory=OutputColumns)  # its frontend's

    state: RequestState = RequestState.WAITING
    order: int = 0  # of arrival, unique
    key: Rank = (0.0, 0)  # place in its flow, see Policy
    rank: Rank = (0.0, 0)  # place among the admitted ones
    flow: Hashable = None  # the flow that it waits in
    admitted_at: float = -1.0  # seconds; negative: not yet
    bindings: list[Binding] = msgspec.field(default_factory=list)  # empty: the base model
    reserves_adapters: bool = False  # all of `bindings`
    parked_on: Hashable = None  # see WaitingQueue
    was_prefetched: bool = False  # its adapters were loaded ahead, once
    chain: BlockChain | None = None
    constraint: Constraint | None = None  # of `grammar`

    token_ids: "array[int]" = msgspec.field(default_factory=int_array)
    num_prompt_tokens: int = 0
    num_total: int = 0
    max_total: int = 0  # prompt and answer never grow past this
    stop_ids: frozenset[int] = frozenset()

    slot: int = -1
    page_epoch: int = 0  # changes whenever the request loses its pages
    num_scheduled: int = 0  # tokens fed by the steps planned so far
    drafter: Drafter | None = None  # None: nothing is drafted
    drafts: "array[int]" = msgspec.field(default_factory=int_array)  # what may follow `token_ids`
    is_verifying: bool = False  # by a step in flight, so the place of its next token is unknown
    num_registered: int = 0  # tokens in blocks that are cached
    capacity: int = 0  # tokens that its pages hold
    num_cached_tokens: int = -1  # tokens of the prompt found cached at first admission
    num_prompt_logprobs: int = 1  # next position to report
    first_token_at: float = -1.0  # seconds; negative: not yet
    reserved_tokens: float = 0.0  # of its tenant's minute; its share of its request's
    tier: str = ""  # one of TIERS: where its slowest adapter was when it was needed

    def __post_init__(self) -> None:
        self.uid = (self.frontend, self.request_id)
        connection = (self.frontend, self.client) if self.client else None
        self.requester = self.tenant or connection
        self.token_ids = self.prompt_token_ids + self.generated_token_ids
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.num_total = len(self.token_ids)
        self.stop_ids = frozenset(self.sampling.stop_token_ids)
        if self.is_resumed:  # the first engine has reported all that comes with the first token
            self.num_cached_tokens = 0
            self.first_token_at = 0.0
            self.sampling = replace(self.sampling, num_prompt_logprobs=-1)

    @classmethod
    def from_message(cls, message: AddRequest, frontend: Hashable) -> "Request":
        return cls(**msgspec.structs.asdict(message), frontend=frontend)

    @property
    def is_resumed(self) -> bool:
        """Tells whether another engine has begun it."""
        return bool(self.generated_token_ids)

    @property
    def versions(self) -> dict[str, AdapterVersion]:
        """Its distinct adapters by content hash; those not inspected are not in it."""
        return distinct_versions(self.bindings)

    def version_of(self, event: Hashable) -> AdapterVersion | None:
        """Returns its adapter whose inspection or load is this event, see WaitingQueue.park."""
        for binding in self.bindings:
            if event in (binding.version, binding.version.content_hash):
                return binding.version
        return None

    def uses(self, version: AdapterVersion) -> bool:
        return any(binding.version is version for binding in self.bindings)

    @property
    def reads_prefix_cache(self) -> bool:
        """Prompt log-probabilities need every prompt position computed."""
        return self.use_prefix_cache and self.sampling.num_prompt_logprobs < 0

    @property
    def has_tokens_in_flight(self) -> bool:
        return self.num_total != len(self.token_ids)

    @property
    def awaits_mask(self) -> bool:
        """True if the mask for its last known token is still being computed."""
        return self.constraint is not None and self.constraint.mask is None

    def finish_reason(self) -> str:
        """Returns why the request ends with its last known token; empty if it goes on.

        Workers mask stop tokens among the first `min_tokens`, so a stop token there does not count.
        """
        num_tokens = len(self.token_ids)
        if (
            self.token_ids[-1] in self.stop_ids
            and num_tokens - self.num_prompt_tokens > self.sampling.min_tokens
        ):
            return "stop"
        return "length" if num_tokens >= self.max_total else ""


def report_refusal(request: Request, refusal: RequestRefused, outputs: OutputTable) -> None:
    """Add the end of a request that cannot be carried out; the refusal is for its client."""
    outputs.add_error(
        request.frontend,
        request.request_id,
        refusal.code,
        refusal.text,
        retry_after_s=refusal.retry_after_s,
        vocabulary=refusal.vocabulary,
    )
