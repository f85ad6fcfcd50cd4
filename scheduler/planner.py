"""Fills one step: decode rows, chunks of prompts, then requests that start; preempts for room."""

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.admission import Admission
from loraplex.scheduler.policies.policy import Context
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.stats import SchedulerStats
from loraplex.scheduler.step_builder import StepBuilder, new_request
from loraplex.scheduler.waiting_queue import WaitingQueue


class StepPlanner:
    """Decides the rows of each step over the running set and the queue that it is given."""

    def __init__(
        self,
        *,
        memory: PageManager,
        running: RunningRequests,
        waiting: WaitingQueue,
        admission: Admission,
        stats: SchedulerStats,
    ) -> None:
        self._memory = memory
        self._running = running
        self._waiting = waiting
        self._admission = admission
        self._stats = stats

    def context(self, now: float) -> Context:
        """What the policy may know of the present."""
        return self._admission.context(now, num_free_slots=self._running.num_free_slots)

    def fill(self, step: StepBuilder, now: float) -> None:
        """Add the rows of the next step; it stays empty if nothing can run."""
        self._plan_running(step, now)
        if self._waiting.by_age and step.budget and self._running.has_free_slot:
            self._plan_waiting(step, now)
        self.look_ahead(now)

    def look_ahead(self, now: float) -> None:
        """Begin loads for requests that wait; also while no step can be planned, so that one that
        has just come has its adapter on the way before the next step."""
        if self._waiting.by_age:
            self._admission.prefetch(now, self._running)

    def vacate(self, request: Request, now: float) -> None:
        """Take slot, pages and adapter from a running request."""
        self._admission.lacked_room = False
        self._running.release(request)
        self._memory.kv.release(request.request_id)
        self._admission.unreserve_adapter(request, now)

    def _plan_running(self, step: StepBuilder, now: float) -> None:
        """Decode rows first, then chunks of prompts in order while the budget lasts.

        Only decoding takes pages: a prompt has all of its own since it started.
        """
        prefills: list[Request] = []
        decodes: list[Request] = []
        positions: list[int] = []
        for request in self._running:
            position = request.num_scheduled
            if request.num_total - position > 1:
                prefills.append(request)
            elif request.num_total < request.max_total:  # else its last token is in flight
                if position == request.capacity and not self._grow(request, step, now):
                    break  # it was the newest of all
                decodes.append(request)
                positions.append(position)
                request.num_scheduled += 1
                request.num_total += 1
        step.add_decodes(decodes, positions)
        for request in prefills:
            if step.budget:
                self._add_chunk(request, step)

    def _add_chunk(self, request: Request, step: StepBuilder) -> None:
        """Add a chunk of known tokens, and cache the blocks that it fills for later steps."""
        step.add_chunk(request)
        kv, num_tokens = self._memory.kv, request.num_scheduled
        kv.register_planned(request.request_id, request.token_ids, num_tokens)
        request.num_registered = num_tokens - num_tokens % kv.block_tokens

    def _grow(self, request: Request, step: StepBuilder, now: float) -> bool:
        """Append a page, at the cost of requests later in the order; False if there are none and
        the request itself had to give way."""
        while not self._memory.num_available:
            newest = self._running.newest  # never before `request`, so the step has no row of it
            if self._admission.unreserve_newest(newest.rank, now):
                continue
            self._preempt(newest, now)
            if newest is request:
                return False
        self._memory.make_room(1)
        kv = self._memory.kv
        for page_id in kv.grow(request.request_id, request.num_scheduled + 1):
            step.add_page(request, page_id)
            request.capacity += kv.block_tokens
        return True

    def _preempt(self, request: Request, now: float) -> None:
        """Back to the queue, at the place its rank gives; its tokens so far are computed again.

        Ids that steps in flight still bring are kept, and awaited before it may resume.
        """
        self.vacate(request, now)
        request.state = RequestState.WAITING
        self._waiting.push(request)
        self._stats.num_preemptions += 1

    def _plan_waiting(self, step: StepBuilder, now: float) -> None:
        def start(request: Request) -> bool:
            self._running.add(request)
            version = request.adapter_version
            adapter = self._memory.adapters.get(version.content_hash) if version else None
            page_ids = self._memory.kv.page_ids(request.request_id)
            step.new_requests.append(
                new_request(request, page_ids, adapter.slot if adapter else -1)
            )
            self._add_chunk(request, step)
            return step.budget > 0 and self._running.has_free_slot

        self._admission.admit(
            context=self.context(now), num_running=len(self._running), start=start
        )
