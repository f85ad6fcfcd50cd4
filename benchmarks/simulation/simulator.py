"""Runs the real scheduler and page accounting with a modelled worker in virtual time.

A simulation shows what the order of service does. Its seconds come from the cost model, not from
a measurement. The same trace and configuration always give the same run.
"""

import heapq
from collections.abc import Callable, Sequence

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AdapterSource, SequenceOutput
from loraplex.scheduler.policies.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT
from loraplex.scheduler.request import RequestRefused
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import StepPlan, StepResult

from modelled_engine import Event, ModelledEngine, make_request
from modelled_worker import CostModel
from sim_result import Moment, SimRequest, SimResult, SimTimeline


def simulate(
    trace: Sequence[SimRequest],
    *,
    config: SchedulerConfig,
    num_pages: int,
    cost: CostModel | None = None,
    adapter_pages: Callable[[int], int] = lambda adapter: 2,
    max_adapter_slots: int = 1024,
    page_manager: Callable[..., PageManager] = PageManager,
    share_pool: bool = True,
) -> SimResult:
    """Serve a trace to its end.

    Args:
        trace: the requests in order of arrival.
        num_pages: size of the pool, the null page included.
        adapter_pages: returns the number of pages of an adapter.
        page_manager: makes the accounts of the pool.
        share_pool: adapters take pages of the pool; otherwise their slots have memory of their own.

    Raises:
        RuntimeError: requests are left that nothing can serve.
    """
    memory = MemoryConfig(enable_prefix_caching=False, max_adapter_slots=max_adapter_slots)
    return _Simulation(
        trace,
        config,
        memory,
        num_pages=num_pages,
        cost=cost or CostModel(),
        pages=adapter_pages,
        page_manager=page_manager,
        share_pool=share_pool,
    ).run()


class _Simulation:
    def __init__(
        self,
        trace: Sequence[SimRequest],
        config: SchedulerConfig,
        memory: MemoryConfig,
        *,
        num_pages: int,
        cost: CostModel,
        pages: Callable[[int], int],
        page_manager: Callable[..., PageManager],
        share_pool: bool,
    ) -> None:
        self._now = 0.0
        self._trace = trace
        self._scheduler = Scheduler(
            config=config,
            memory=memory,
            num_pages=num_pages,
            max_model_len=max(r.num_prompt_tokens + r.num_new_tokens for r in trace),
            base_fingerprint="modelled",
            clock=lambda: self._now,
            page_manager=page_manager,
        )
        self._engine = ModelledEngine(
            self._scheduler,
            cost=cost,
            adapter_pages=pages if share_pool else lambda adapter: 0,
            clock=lambda: self._now,
            push=self._push,
        )
        for adapter in {r.adapter for r in trace if r.adapter is not None}:
            self._scheduler.register_adapter(str(adapter), AdapterSource.at(str(adapter)))
        # (time, number, event); the number keeps events of one time in order
        self._events: list[tuple[float, int, Event]] = []
        self._num_events = 0
        self._service = dict.fromkeys(sorted({r.tenant for r in trace}), 0.0)
        self._num_waiting = dict.fromkeys(self._service, 0)
        self._result = SimResult([SimTimeline(request) for request in trace])

    def run(self) -> SimResult:
        num_added = 0
        while True:
            while num_added < len(self._trace) and (self._trace[num_added].arrival_s <= self._now):
                self._add(num_added)
                num_added += 1
            while self._events and self._events[0][0] <= self._now:
                self._take(heapq.heappop(self._events)[2])
            self._plan()
            upcoming = [self._events[0][0]] if self._events else []
            if num_added < len(self._trace):
                upcoming.append(self._trace[num_added].arrival_s)
            if not upcoming:
                break
            self._now = min(upcoming)
        if self._scheduler.num_unfinished:
            raise RuntimeError(f"{self._scheduler.num_unfinished} requests are left unserved")
        stats = self._scheduler.stats()
        self._result.num_loads = stats["num_adapter_loads"]
        self._result.num_preemptions = stats["num_preemptions"]
        self._result.num_new_tokens = stats["num_generated_tokens"]
        self._result.end_s = self._now
        return self._result

    def _add(self, index: int) -> None:
        asked = self._trace[index]
        request = make_request(
            index,
            num_prompt_tokens=asked.num_prompt_tokens,
            num_new_tokens=asked.num_new_tokens,
            adapter=asked.adapter,
            salt=asked.tenant,
            priority=asked.priority,
        )
        self._num_waiting[asked.tenant] += 1
        try:
            self._scheduler.add(request)
        except RequestRefused as refusal:
            self._end(index, refusal.code)

    def _end(self, index: int, error_code: str = "") -> None:
        timeline = self._result.timelines[index]
        timeline.end_s, timeline.error_code = self._now, error_code
        if timeline.start_s is None:
            self._num_waiting[timeline.request.tenant] -= 1

    def _plan(self) -> None:
        for output in self._engine.plan(self._on_step):
            self._end(output.request_id, output.error_code)

    def _push(self, time_s: float, event: Event) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def _on_step(self, plan: StepPlan, num_adapters: int) -> None:
        for new in plan.new_requests:
            timeline = self._result.timelines[new.token_ids[0]]
            if timeline.start_s is None:
                asked = timeline.request
                timeline.start_s = self._now
                self._num_waiting[asked.tenant] -= 1
                self._service[asked.tenant] += PROMPT_WEIGHT * asked.num_prompt_tokens
        self._result.step_adapters.append(num_adapters)

    def _take(self, event: Event) -> None:
        for output in self._engine.take(event):
            self._on_output(output)
        if isinstance(event, StepResult) and len(self._service) > 1:
            self._result.moments.append(
                Moment(self._now, dict(self._service), dict(self._num_waiting))
            )

    def _on_output(self, output: SequenceOutput) -> None:
        timeline = self._result.timelines[output.request_id]
        if timeline.first_token_s is None:
            timeline.first_token_s = self._now
        self._service[timeline.request.tenant] += OUTPUT_WEIGHT * len(output.token_ids)
        if output.finish_reason:
            self._end(output.request_id)
