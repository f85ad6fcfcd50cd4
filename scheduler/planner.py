"""Plans steps: decode rows, prompts, requests that start, then drafts; preempts for room."""

import math
from collections import deque
from collections.abc import Callable

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.admission import Admission
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policies.policy import Context, Policy
from loraplex.scheduler.prompt_shares import MAX_PARTIAL_PROMPTS, prompt_shares
from loraplex.scheduler.request import Rank, Request, RequestState
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.speculation.draft_limits import (
    MAX_SAMPLED,
    max_drafts,
    most_wait,
    waits_for_result,
)
from loraplex.scheduler.speculation.drafter import Drafter
from loraplex.scheduler.stats import SchedulerStats
from loraplex.scheduler.step_builder import StepBuilder, new_request
from loraplex.scheduler.waiting_queue import WaitingQueue
from loraplex.scheduler.worker_protocol import AdapterBinding, StepPlan, StepResult

FIRST_RANK: Rank = (-math.inf, -1)
"""Comes before the rank of every request."""


class StepPlanner:
    """Decides the rows of each step and keeps the steps in flight, oldest first."""

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        memory: PageManager,
        running: RunningRequests,
        waiting: WaitingQueue,
        admission: Admission,
        policy: Policy,
        stats: SchedulerStats,
        fail: Callable[[Request, str, str, float], None],
    ) -> None:
        """`fail` ends a waiting request with an error code and text, at a time in seconds."""
        self._config = config
        self._memory = memory
        self._running = running
        self._waiting = waiting
        self._admission = admission
        self._policy = policy
        self._stats = stats
        self._fail = fail
        self._in_flight: deque[StepBuilder] = deque()
        self._speculation = config.speculation
        self._max_drafts = 0  # of each request in the step that is being planned

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_prompt_tokens_in_flight(self) -> int:
        return sum(step.num_prompt_tokens for step in self._in_flight)

    @property
    def has_capacity(self) -> bool:
        """True if one more step may be sent before a result comes."""
        return len(self._in_flight) < self._config.max_steps_in_flight

    def context(self, now: float) -> Context:
        """Returns what the policy may know of the present."""
        return self._admission.context(now, num_free_slots=self._running.num_free_slots)

    def plan(self, now: float) -> StepPlan | None:
        """Plan the next step and count it as in flight.

        Returns:
            None if nothing can run, if `max_steps_in_flight` are in flight already, or if the
            results of those are better waited for.
        """
        self._max_drafts = max_drafts(self._speculation, len(self._running))
        if not self.has_capacity or self._must_wait():
            self.look_ahead(now)
            return None
        self._fail_late(now)
        plan = self._plan_step(now)
        while plan is None and self._is_stuck():
            # The first in the policy's order may lack pages that one behind it has reserved.
            if not self._admission.unreserve_newest(FIRST_RANK, now):
                self._fail_first(now)
            plan = self._plan_step(now)
        return plan

    def _must_wait(self) -> bool:
        """True if a step would leave out most of the running requests, which verify drafts."""
        is_speculating = self._max_drafts and self._in_flight
        return bool(is_speculating) and most_wait(self._running, self._max_drafts)

    def _plan_step(self, now: float) -> StepPlan | None:
        blocks = self._memory.blocks
        step = StepBuilder(
            blocks.num_planned, self._config.max_num_batched_tokens, follows=bool(self._running)
        )
        prompts, verifying = self._plan_running(step, now)
        self._plan_prompts(prompts, step, now)
        for request in verifying:
            self._plan_drafts(request, step)
        self.look_ahead(now)
        if not step.requests:
            return None
        blocks.num_planned += 1
        num_tokens = sum(step.num_tokens)
        self._stats.num_scheduled_tokens += num_tokens
        self._stats.step_tokens.observe(num_tokens)
        self._in_flight.append(step)
        return step.finish(self._running.take_freed_slots())

    def pop_oldest(self, result: StepResult) -> StepBuilder:
        """Return the oldest step in flight, which ends with `result`.

        Raises:
            ValueError: the result answers no step, or another one.
        """
        if not self._in_flight:
            raise ValueError(f"result of step {result.step_id} came, but no step is in flight")
        self._in_flight[0].check(result)
        return self._in_flight.popleft()

    def _fail_late(self, now: float) -> None:
        """Fail the waiting requests that the policy expects to miss their deadline."""
        for request in self._policy.requests_to_drop(self._waiting, self.context(now)):
            self._stats.num_deadline_drops += 1
            text = (
                f"the first token would have come later than ttft_slo_s "
                f"({self._config.ttft_slo_s} s) after the request; try again when fewer wait"
            )
            self._fail(request, "deadline", text, now)

    def _is_stuck(self) -> bool:
        """True if requests wait and nothing that runs, loads or is in flight can help them."""
        busy = self._running or self._in_flight or self._admission.num_loading
        waiting = self._waiting.by_age
        return bool(waiting) and not busy and not any(r.awaits_mask for r in waiting)

    def _fail_first(self, now: float) -> None:
        """Fail the first waiting request, which should have started in an idle engine.

        Requests that fit were let in, so this is a fault of the scheduler. An error serves the
        client better than silence.
        """
        order = self._policy.order(self._waiting, self.context(now))
        request = next(order, self._waiting.by_age[0])
        text = "no room to start, although nothing else runs: this is a fault of the engine"
        self._fail(request, "internal", text, now)

    def look_ahead(self, now: float) -> None:
        """Begin to load adapters of waiting requests.

        Called also while no step can be planned, so that the load for a new request begins at once.
        """
        if self._waiting.by_age:
            self._admission.prefetch(now, self._running)

    def vacate(self, request: Request, now: float) -> None:
        """Take slot, pages and adapter from a running request."""
        self._admission.lacked_room = False
        self._running.release(request)
        self._memory.kv.release(request.uid)
        self._admission.unreserve_adapters(request, now)

    def _plan_running(self, step: StepBuilder, now: float) -> tuple[list[Request], list[Request]]:
        """Add the decode rows. Returns the running requests with prompts to compute, in order, and
        those whose next row verifies drafts, which have their share of the budget.

        Only decoding takes pages: a prompt has all of its own since it started.
        """
        prefills: list[Request] = []
        verifying: list[Request] = []
        decodes: list[Request] = []
        positions: list[int] = []
        for request in self._running:
            position = request.num_scheduled
            if request.num_total - position > 1:
                prefills.append(request)
            elif (
                request.constraint is not None or request.is_verifying or request.drafts
            ) and waits_for_result(request, self._max_drafts):
                continue
            elif request.num_total < request.max_total:  # else its last token is in flight
                if position == request.capacity and not self._grow(request, step, now):
                    break  # it was the newest of all
                request.num_scheduled += 1
                request.num_total += 1
                if self._max_drafts and request.drafts:
                    verifying.append(request)
                    continue
                decodes.append(request)
                positions.append(position)
        step.add_decodes(decodes, positions)
        step.budget -= len(verifying)
        return prefills, verifying

    def _plan_prompts(self, prompts: list[Request], step: StepBuilder, now: float) -> None:
        """Give running prompts their shares, start requests, and give out what is left in order."""
        starts = (
            bool(self._waiting.by_age)
            and self._running.has_free_slot
            and len(prompts) < MAX_PARTIAL_PROMPTS
        )
        num_left = [request.num_total - request.num_scheduled for request in prompts]
        shares = prompt_shares(num_left, step.budget, newcomers=starts)
        for request, share in zip(prompts, shares, strict=True):
            if share:
                self._add_chunk(request, step, share)
        if starts and step.budget:
            self._plan_waiting(step, now)
        for request, left, share in zip(prompts, num_left, shares, strict=True):
            if share < left and step.budget:
                self._add_chunk(request, step, left - share)

    def _plan_drafts(self, request: Request, step: StepBuilder) -> None:
        """Add a row with the drafts that other rows and pages have left room for."""
        position, kv = request.num_scheduled - 1, self._memory.kv
        num_drafts = min(
            len(request.drafts),
            self._max_drafts,
            step.budget,
            MAX_SAMPLED - step.num_sampled - 1,
            request.max_total - request.num_total,
        )
        if request.constraint is not None:
            num_drafts = min(num_drafts, len(request.constraint.draft_masks))
        num_missing = kv.num_pages_for(position + 1 + num_drafts)
        num_missing -= kv.num_pages_for(request.capacity)
        if num_missing > 0:
            # Requests that decode may want a page each: drafts preempt none of them.
            num_spare = self._memory.num_available - len(self._running)
            num_pages = max(0, min(num_missing, num_spare))
            self._append_pages(request, step, num_pages)
            num_drafts = min(num_drafts, request.capacity - position - 1)
        step.add_verification(request, request.drafts[: max(0, num_drafts)])

    def _add_chunk(self, request: Request, step: StepBuilder, max_tokens: int) -> None:
        """Add a chunk of known tokens, and cache the blocks that it fills for later steps."""
        step.add_chunk(request, max_tokens)
        kv, num_tokens = self._memory.kv, request.num_scheduled
        kv.register_planned(request.uid, request.token_ids, num_tokens)
        request.num_registered = num_tokens - num_tokens % kv.block_tokens

    def _grow(self, request: Request, step: StepBuilder, now: float) -> bool:
        """Append a page, taken from requests later in the order if none is free.

        Returns:
            False if there are no later ones, and the request itself was preempted.
        """
        while not self._memory.num_available:
            newest = self._running.newest  # never before `request`, so the step has no row of it
            if self._admission.unreserve_newest(newest.rank, now):
                continue
            self._preempt(newest, now)
            if newest is request:
                return False
        self._append_pages(request, step, 1)
        return True

    def _append_pages(self, request: Request, step: StepBuilder, num_pages: int) -> None:
        """Append pages, which must be available."""
        self._memory.make_room(num_pages)
        kv = self._memory.kv
        capacity = request.capacity + num_pages * kv.block_tokens
        for page_id in kv.grow(request.uid, capacity):
            step.add_page(request, page_id)
        request.capacity = capacity

    def _preempt(self, request: Request, now: float) -> None:
        """Put a request back in the queue at the place of its rank; it is recomputed later.

        It keeps the ids that steps in flight still bring, and resumes only once they have come.
        """
        self.vacate(request, now)
        request.state = RequestState.WAITING
        self._waiting.push(request)
        self._stats.num_preemptions += 1

    def _plan_waiting(self, step: StepBuilder, now: float) -> None:
        def start(request: Request) -> bool:
            self._running.add(request)
            if self._speculation is not None and request.drafter is None:
                request.drafter = Drafter(
                    self._speculation,
                    num_prompt_tokens=request.num_prompt_tokens,
                    stop_ids=request.stop_ids,
                )
            adapters = self._memory.adapters
            bindings = [
                AdapterBinding(adapters.slot_of(b.version.content_hash), b.weight, b.first_position)
                for b in request.bindings
            ]
            page_ids = self._memory.kv.page_ids(request.uid)
            step.new_requests.append(new_request(request, page_ids, bindings))
            self._add_chunk(request, step, step.budget)
            return step.budget > 0 and self._running.has_free_slot

        self._admission.admit(
            context=self.context(now), num_running=len(self._running), start=start
        )
