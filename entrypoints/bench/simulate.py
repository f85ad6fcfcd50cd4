"""The real scheduler, over real page books, with a modelled worker and virtual time.

What it shows is what the order of service does; its seconds are those of the cost model, not
measured ones. Everything is deterministic: the same trace and configuration give the same run.
"""

import heapq
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policies.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT
from loraplex.scheduler.request import Request, RequestRefused, RequestUpdate
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    SamplingSpec,
    StepPlan,
    StepResult,
    UnloadAdapter,
    int_array,
)

_NO_SAMPLING = SamplingSpec(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0, max_tokens=1, min_tokens=0,
    stop_token_ids=int_array(), num_logprobs=-1, num_prompt_logprobs=-1,
    bias_token_ids=int_array(), bias_values=array("f"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds that a worker takes; the defaults are Llama-2-7B in bf16 on one H200.

    step = fixed + decode rows * row + context tokens * kv_token + prompt tokens * prompt_token
           + bytes of the step's distinct adapters / bandwidth
    A load takes its bytes over the link; loads go one after the other, beside the steps.
    """

    fixed_s: float = 3.33e-3  # measured: all linear layers, 3.7 ms at 32 rows, 6.3 ms at 256
    row_s: float = 11.6e-6
    kv_token_s: float = 0.118e-6  # 524,288 bytes of KV at 4.45 TB/s, measured for 256 rows
    prompt_token_s: float = 26e-6  # assumed: 13 GFLOP at 500 TFLOP/s
    bandwidth: float = 4.28e12  # bytes/s, measured copy
    link: float = 54.8e9  # bytes/s, pinned host memory to device, measured
    page_bytes: int = 8 << 20  # over all layers: 16 tokens, or rank 8 on q, k, v, o in 2 pages


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request of a trace. `adapter` is None for the base model."""

    arrival_s: float
    num_prompt_tokens: int
    num_new_tokens: int
    adapter: int | None = None
    tenant: str = ""
    priority: int = 0


@dataclass(slots=True)
class Outcome:
    """What came of a request, in virtual seconds."""

    request: SimRequest
    start_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    error_code: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.request.arrival_s


@dataclass(frozen=True, slots=True)
class Moment:
    """State after a step: service so far (w_p, w_q as in VTC) and waiting requests, by tenant."""

    time_s: float
    service: Mapping[str, float]
    num_waiting: Mapping[str, int]


@dataclass(slots=True)
class SimResult:
    outcomes: list[Outcome]
    moments: list[Moment] = field(default_factory=list)
    step_adapters: list[int] = field(default_factory=list)  # distinct ones of each step
    num_loads: int = 0
    num_preemptions: int = 0
    num_new_tokens: int = 0
    end_s: float = 0.0


class ModelledWorker:
    """Keeps what the cost of a step depends on, from the plans and commands alone."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._adapter_of: dict[int, int] = {}  # slot -> adapter slot
        self._bytes_of: dict[int, int] = {}  # adapter slot -> bytes
        self._free_at = 0.0
        self._link_free_at = 0.0

    def load(self, command: LoadAdapter, now: float) -> float:
        """Returns when the load ends."""
        num_bytes = len(command.page_ids) * self.cost.page_bytes
        self._bytes_of[command.adapter_slot] = num_bytes
        self._link_free_at = max(now, self._link_free_at) + num_bytes / self.cost.link
        return self._link_free_at

    def step(self, plan: StepPlan, now: float) -> tuple[float, int]:
        """Returns when the step ends and how many distinct adapters it has."""
        for slot in plan.freed_slots:
            self._adapter_of.pop(slot, None)
        for new in plan.new_requests:
            self._adapter_of[new.slot] = new.adapter_slot
        adapters = {self._adapter_of[slot] for slot in plan.slots} - {-1}
        num_decodes = num_context = num_prompt = 0
        for position, num_tokens in zip(plan.positions, plan.num_tokens, strict=True):
            num_context += position + 1
            if num_tokens == 1:
                num_decodes += 1
            else:
                num_prompt += num_tokens
        cost = self.cost
        seconds = (
            cost.fixed_s
            + num_decodes * cost.row_s
            + num_context * cost.kv_token_s
            + num_prompt * cost.prompt_token_s
            + sum(self._bytes_of[adapter] for adapter in adapters) / cost.bandwidth
        )
        self._free_at = max(now, self._free_at) + seconds
        return self._free_at, len(adapters)


def simulate(
    trace: Sequence[SimRequest],
    *,
    config: SchedulerConfig,
    num_pages: int,
    cost: CostModel | None = None,
    adapter_pages: Callable[[int], int] = lambda adapter: 2,
    max_adapter_slots: int = 1024,
) -> SimResult:
    """Serve a trace to its end.

    Args:
        trace: in order of arrival.
        num_pages: of the pool, the null page included.
        adapter_pages: pages of each adapter.
    """
    memory = MemoryConfig(enable_prefix_caching=False, max_adapter_slots=max_adapter_slots)
    return _Simulation(
        trace, config, memory, num_pages=num_pages, cost=cost or CostModel(), pages=adapter_pages
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
    ) -> None:
        self._now = 0.0
        self._trace = trace
        self._pages = pages
        self._worker = ModelledWorker(cost)
        self._scheduler = Scheduler(
            config=config,
            memory=memory,
            num_pages=num_pages,
            max_model_len=max(r.num_prompt_tokens + r.num_new_tokens for r in trace),
            base_fingerprint="modelled",
            clock=lambda: self._now,
        )
        for adapter in {r.adapter for r in trace if r.adapter is not None}:
            self._scheduler.register_adapter(str(adapter), str(adapter))
        # (time, number, event): steps end in order, loads as the link has them
        self._events: list[tuple[float, int, StepResult | AdapterLoaded]] = []
        self._num_events = 0
        self._service = dict.fromkeys(sorted({r.tenant for r in trace}), 0.0)
        self._num_waiting = dict.fromkeys(self._service, 0)
        self._result = SimResult([Outcome(request) for request in trace])

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
            raise RuntimeError(f"{self._scheduler.num_unfinished} requests wait for nothing")
        stats = self._scheduler.stats()
        self._result.num_loads = stats["num_adapter_loads"]
        self._result.num_preemptions = stats["num_preemptions"]
        self._result.num_new_tokens = stats["num_generated_tokens"]
        self._result.end_s = self._now
        return self._result

    def _add(self, index: int) -> None:
        asked = self._trace[index]
        prompt = array("i", bytes(4 * asked.num_prompt_tokens))
        prompt[0] = index  # by which a plan's new requests are told apart
        request = Request(
            request_id=index,
            prompt_token_ids=prompt,
            sampling=replace(_NO_SAMPLING, max_tokens=asked.num_new_tokens),
            adapter="" if asked.adapter is None else str(asked.adapter),
            salt=asked.tenant,
            priority=asked.priority,
        )
        self._num_waiting[asked.tenant] += 1
        try:
            self._scheduler.add(request)
        except RequestRefused as refusal:
            self._end(index, refusal.code)

    def _end(self, index: int, error_code: str = "") -> None:
        outcome = self._result.outcomes[index]
        outcome.end_s, outcome.error_code = self._now, error_code
        if outcome.start_s is None:
            self._num_waiting[outcome.request.tenant] -= 1

    def _plan(self) -> None:
        while True:
            plan = self._scheduler.plan()
            num_inspected = self._run_commands()
            for update in self._scheduler.take_updates():
                self._end(_index(update), update.error_code)
            if plan is None and not num_inspected:
                return
            if plan is not None:
                self._send(plan)

    def _run_commands(self) -> int:
        """Returns how many adapters were inspected, which takes no time."""
        num_inspected = 0
        for command in self._scheduler.take_commands():
            match command:
                case InspectAdapter():
                    num_inspected += 1
                    pages = self._pages(int(command.path))
                    self._scheduler.on_adapter_inspected(
                        AdapterInspected(
                            command.name, command.path, content_hash=command.path, num_pages=pages
                        )
                    )
                case LoadAdapter():
                    done = AdapterLoaded(command.adapter_slot, command.content_hash)
                    self._push(self._worker.load(command, self._now), done)
                case UnloadAdapter():
                    pass
        return num_inspected

    def _push(self, time_s: float, event: StepResult | AdapterLoaded) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def _send(self, plan: StepPlan) -> None:
        for new in plan.new_requests:
            outcome = self._result.outcomes[new.token_ids[0]]
            if outcome.start_s is None:
                asked = outcome.request
                outcome.start_s = self._now
                self._num_waiting[asked.tenant] -= 1
                self._service[asked.tenant] += PROMPT_WEIGHT * asked.num_prompt_tokens
        end_s, num_adapters = self._worker.step(plan, self._now)
        self._result.step_adapters.append(num_adapters)
        self._push(end_s, StepResult(plan.step_id, int_array([0] * sum(plan.samples))))

    def _take(self, event: StepResult | AdapterLoaded) -> None:
        if isinstance(event, AdapterLoaded):
            self._scheduler.on_adapter_loaded(event)
            return
        for update in self._scheduler.commit(event):
            self._on_update(update)
        if len(self._service) > 1:
            self._result.moments.append(
                Moment(self._now, dict(self._service), dict(self._num_waiting))
            )

    def _on_update(self, update: RequestUpdate) -> None:
        outcome = self._result.outcomes[_index(update)]
        if outcome.first_token_s is None:
            outcome.first_token_s = self._now
        self._service[outcome.request.tenant] += OUTPUT_WEIGHT * len(update.token_ids)
        if update.finish_reason:
            self._end(_index(update))


def _index(update: RequestUpdate) -> Any:
    """Place in the trace: what the simulation gave the scheduler as request id."""
    return update.request_id
