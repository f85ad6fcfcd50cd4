"""One step while it is planned, and while the workers have it."""

from array import array
from itertools import takewhile

from loraplex.scheduler.request import Request
from loraplex.scheduler.worker_protocol import (
    AdapterBinding,
    NewRequest,
    StepPlan,
    StepResult,
    int_array,
)


class StepBuilder:
    """Collects the rows of one step and remembers their requests until the result comes.

    A row's result goes to the request that had the row, whoever owns its slot later. The pages of
    row r are the request's still if its `page_epoch` is `page_epochs[r]`.
    """

    __slots__ = (
        "budget", "chunk_rows", "drafts", "follows", "new_requests", "num_new",
        "num_prompt_tokens", "num_sampled", "num_tokens", "page_epochs", "page_ids",
        "page_slots", "positions", "requests", "samples", "slots", "step_id",
    )  # fmt: skip

    def __init__(self, step_id: int, budget: int, follows: bool = False) -> None:
        self.step_id = step_id
        self.follows = follows  # requests were running already: the GPU should not have waited
        self.budget = budget  # tokens that the step can still take
        self.chunk_rows: dict[Request, int] = {}
        self.requests: list[Request] = []
        self.positions: list[int] = []
        self.num_tokens: list[int] = []
        self.num_prompt_tokens = 0  # in chunks
        self.samples: list[int] = []
        self.num_sampled = 0
        self.num_new = self.samples  # tokens that each row brings its request; set by check()
        self.drafts: dict[Request, array[int]] = {}  # in the order of their rows
        self.slots: list[int] = []  # this and `page_epochs` are filled by finish()
        self.page_epochs: list[int] = []
        self.new_requests: list[NewRequest] = []
        self.page_slots: list[int] = []
        self.page_ids: list[int] = []

    def add_decodes(self, requests: list[Request], positions: list[int]) -> None:
        """Add rows of one token each. The caller has advanced the requests' counts already."""
        self.requests += requests
        self.positions += positions
        ones = [1] * len(requests)
        self.num_tokens += ones
        self.samples += ones
        self.num_sampled += len(requests)
        self.budget -= len(requests)

    def add_verification(self, request: Request, drafts: "array[int]") -> None:
        """Feed a request's last known token and drafts, and sample after each of them.

        Such rows come after all others. The caller has advanced the request's counts by one token
        already, and has taken that token from the budget.
        """
        row = 0  # without drafts it decodes: those rows come first
        if drafts:
            self.drafts[request] = drafts
            request.is_verifying = True
            row = len(self.requests)
        self.requests.insert(row, request)
        self.positions.insert(row, request.num_scheduled - 1)
        self.num_tokens.insert(row, 1 + len(drafts))
        self.samples.insert(row, 1 + len(drafts))
        self.num_sampled += 1 + len(drafts)
        self.budget -= len(drafts)

    def add_chunk(self, request: Request, max_tokens: int) -> None:
        """Feed the next tokens of a request; sample if they are its last.

        A request that has a chunk in this step gets a longer one.
        """
        position = request.num_scheduled
        num_tokens = min(request.num_total - position, max_tokens, self.budget)
        samples = position + num_tokens == request.num_total
        row = self.chunk_rows.get(request)
        if row is None:
            self.chunk_rows[request] = len(self.requests)
            self.requests.append(request)
            self.positions.append(position)
            self.num_tokens.append(num_tokens)
            self.samples.append(samples)
        else:
            self.num_tokens[row] += num_tokens
            self.samples[row] = samples
        self.num_sampled += samples
        self.budget -= num_tokens
        self.num_prompt_tokens += num_tokens
        request.num_scheduled += num_tokens
        request.num_total += samples

    def add_page(self, request: Request, page_id: int) -> None:
        self.page_slots.append(request.slot)
        self.page_ids.append(page_id)

    def finish(self, freed_slots: list[int]) -> StepPlan:
        """Return the plan. No rows may be added afterwards."""
        self.slots = [request.slot for request in self.requests]
        self.page_epochs = [request.page_epoch for request in self.requests]
        masked_rows, masks = self._masks()
        draft_ids = int_array()
        for drafts in self.drafts.values():
            draft_ids += drafts
        return StepPlan(
            step_id=self.step_id,
            freed_slots=int_array(freed_slots),
            new_requests=self.new_requests,
            page_slots=int_array(self.page_slots),
            page_ids=int_array(self.page_ids),
            slots=int_array(self.slots),
            positions=int_array(self.positions),
            num_tokens=int_array(self.num_tokens),
            samples=int_array(self.samples),
            masked_rows=masked_rows,
            masks=masks,
            draft_ids=draft_ids,
        )

    def _masks(self) -> "tuple[array[int], array[int]]":
        """Returns the rows that sample under a constraint, and the masks of the tokens that they
        sample one after another."""
        rows, found = array("i"), list["array[int]"]()
        for row, request in enumerate(self.requests):
            constraint = request.constraint
            if constraint is not None and self.samples[row]:
                if constraint.mask is None:
                    raise ValueError(f"request {request.request_id!r} is planned without its mask")
                rows.append(row)
                found.append(constraint.mask)
                found += constraint.draft_masks[: self.samples[row] - 1]
        # An adapter with added tokens has longer masks than the base model.
        num_words, masks = max(map(len, found), default=0), array("i")
        for mask in found:
            masks += mask
            masks.frombytes(bytes(4 * (num_words - len(mask))))
        return rows, masks

    def check(self, result: StepResult) -> None:
        """Raise ValueError unless `result` answers this step. Set `num_new`."""
        if result.step_id != self.step_id:
            raise ValueError(f"result of step {result.step_id} came, {self.step_id} is next")
        num_samples = self.num_sampled
        if len(result.token_ids) != num_samples:
            raise ValueError(
                f"step {self.step_id} samples {num_samples} tokens, got {len(result.token_ids)}"
            )
        if len(result.logprobs) not in (0, num_samples):
            raise ValueError(
                f"step {self.step_id} samples {num_samples} tokens, got logprobs of "
                f"{len(result.logprobs)}"
            )
        if self.drafts:
            self._verify(result.token_ids)

    def _verify(self, sampled: "array[int]") -> None:
        """Count the tokens of each row up to the first that differs from its draft.

        A token was sampled as if the drafts before it were the answer so far, so it is what would
        have been sampled without them if they are.
        """
        self.num_new = self.samples[:]
        first = len(self.samples) - len(self.drafts)  # row
        start = sum(self.samples[:first])
        for row, drafts in enumerate(self.drafts.values(), first):
            self.num_new[row] = 1 + num_equal(drafts, sampled[start : start + len(drafts)])
            start += 1 + len(drafts)


def num_equal(first: "array[int]", second: "array[int]") -> int:
    """Returns how many leading items are equal."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def new_request(
    request: Request, page_ids: list[int], bindings: list[AdapterBinding]
) -> NewRequest:
    """Returns everything a worker must know of a request that starts or resumes."""
    token_ids: array[int] = request.token_ids[:]
    return NewRequest(
        slot=request.slot,
        token_ids=token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        page_ids=int_array(page_ids),
        bindings=bindings,
        sampling=request.sampling,
    )
