"""A cluster in virtual time: the real placement over real schedulers with modelled workers.

The router holds requests that no engine can take, in order of arrival. Engines report at most every
`REPORT_S`; between the router and an engine no time passes.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.placement.cluster_view import ClusterView
from loraplex.scheduler.placement.demand import AdapterDemand
from loraplex.scheduler.placement.engine_reporter import EngineReporter
from loraplex.scheduler.placement.placement import place
from loraplex.scheduler.placement.placement_request import PlacementRequest
from loraplex.scheduler.placement.scaling import ScalePolicy
from loraplex.scheduler.scheduler import Scheduler

from cluster_result import ClusterResult
from modelled_engine import Event, ModelledEngine, make_request
from modelled_worker import CostModel
from sim_result import SimRequest, SimTimeline

REPORT_S = 0.02
HEARTBEAT_S = 0.25  # an engine without steps reports this often
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster of equal engines. `scale` lets engines start, in `start_s`, and go."""

    num_engines: int
    placement: str
    scheduler: SchedulerConfig
    num_pages: int
    adapter_pages: Callable[[int], int]
    objective_s: float
    cost: CostModel = field(default_factory=CostModel)
    scale: Callable[[], ScalePolicy] | None = None
    start_s: float = 0.0
    scale_every_s: float = 0.5


@dataclass(slots=True)
class _Node:
    """One engine and the requests that it has."""

    engine: ModelledEngine
    reporter: EngineReporter
    adapters: set[int] = field(default_factory=set)  # registered ones
    requests: set[int] = field(default_factory=set)
    num_received: int = 0
    reported_at: float = -1.0


class ModelledCluster:
    """Serves a trace with one router over many engines."""

    def __init__(self, spec: ClusterSpec, trace: Sequence[SimRequest]) -> None:
        self._spec = spec
        self._trace = trace
        self._now = 0.0
        self._random = Random(0)
        self._view = ClusterView()
        self._demand = AdapterDemand()
        self._scale = spec.scale() if spec.scale else None
        self._nodes: dict[str, _Node] = {}
        self._starting: list[float] = []  # when engines that were asked for are up
        self._num_started = 0
        self._next_scale = 0.0
        self._queue: deque[int] = deque()
        self._num_generated = [0] * len(trace)
        self._recent: deque[bool] = deque(maxlen=1000)  # first tokens: within the objective?
        self._events: list[tuple[float, int, str, Event]] = []
        self._num_events = 0
        self._result = ClusterResult([SimTimeline(request) for request in trace])
        for _ in range(spec.num_engines):
            self._start_engine()

    def run(self) -> ClusterResult:
        """Serve the trace to its end.

        Raises RuntimeError if requests are left that nothing can serve.
        """
        num_added = 0
        half_s = self._trace[len(self._trace) // 2].arrival_s
        while True:
            if not self._result.num_loads_first_half and self._now >= half_s:
                self._result.num_loads_first_half = self._num_loads()
            while num_added < len(self._trace) and self._trace[num_added].arrival_s <= self._now:
                self._add(num_added)
                num_added += 1
            while self._events and self._events[0][0] <= self._now:
                _, _, engine_id, event = heapq.heappop(self._events)
                self._take(engine_id, event)
            self._start_due_engines()
            self._dispatch()
            if self._scale is not None and self._now >= self._next_scale:
                self._decide(self._scale)
            upcoming = [self._events[0][0]] if self._events else []
            if num_added < len(self._trace):
                upcoming.append(self._trace[num_added].arrival_s)
            if not upcoming and not self._starting:
                break
            self._now = min(upcoming + self._starting)
        if any(timeline.end_s is None for timeline in self._result.timelines):
            raise RuntimeError("requests are left unserved")
        for node in self._nodes.values():
            self._count(node)
        self._result.end_s = self._now
        return self._result

    # Requests

    def _add(self, index: int) -> None:
        asked = self._trace[index]
        self._queue.append(index)
        self._demand.observe(
            _hash(asked), asked.num_prompt_tokens + asked.num_new_tokens, self._now
        )

    def _dispatch(self) -> None:
        if not self._queue:
            return
        for engine_id, node in self._nodes.items():
            if self._now - node.reported_at > HEARTBEAT_S:
                self._report(engine_id, node)
        touched: dict[str, None] = {}  # in order: a set of texts would make each run another one
        while self._queue and (chosen := self._place(self._queue[0])) is not None:
            self._send(chosen, self._queue.popleft())
            touched[chosen] = None
        for engine_id in touched:
            self._plan(engine_id)

    def _place(self, index: int) -> str | None:
        asked = self._trace[index]
        num_tokens = asked.num_prompt_tokens + self._num_generated[index]
        pages = -(-num_tokens // BLOCK_TOKENS) + self._pages(asked)
        request = PlacementRequest(
            content_hash=_hash(asked),
            prompt_tokens=num_tokens,
            pages=pages,
            num_candidates=self._demand.num_candidates(_hash(asked), len(self._nodes)),
            objective_s=self._spec.objective_s,
        )
        decision = place(
            request, self._view.summaries(self._now), self._spec.placement, self._random
        )
        if decision is None:
            self._result.num_queued += asked.arrival_s == self._now
            return None
        self._view.on_sent(decision.engine_id, request)
        return decision.engine_id

    def _send(self, engine_id: str, index: int) -> None:
        asked, node = self._trace[index], self._nodes[engine_id]
        scheduler = node.engine.scheduler
        if asked.adapter is not None and asked.adapter not in node.adapters:
            node.adapters.add(asked.adapter)
            scheduler.register_adapter(str(asked.adapter), AdapterSource.at(str(asked.adapter)))
        done = self._num_generated[index]
        scheduler.add(
            make_request(
                index,
                num_prompt_tokens=asked.num_prompt_tokens + done,
                num_new_tokens=asked.num_new_tokens - done,
                adapter=asked.adapter,
            )
        )
        node.requests.add(index)
        node.num_received += 1

    def _pages(self, asked: SimRequest) -> int:
        return 0 if asked.adapter is None else self._spec.adapter_pages(asked.adapter)

    # Engines

    def _start_engine(self) -> None:
        engine_id = f"engine-{self._num_started}"
        self._num_started += 1
        spec = self._spec

        def push(time_s: float, event: Event) -> None:
            self._num_events += 1
            heapq.heappush(self._events, (time_s, self._num_events, engine_id, event))

        scheduler = Scheduler(
            config=spec.scheduler,
            memory=MemoryConfig(enable_prefix_caching=False, max_adapter_slots=1024),
            num_pages=spec.num_pages,
            max_model_len=max(r.num_prompt_tokens + r.num_new_tokens for r in self._trace),
            base_fingerprint="modelled",
            clock=lambda: self._now,
        )
        engine = ModelledEngine(
            scheduler,
            cost=spec.cost,
            adapter_pages=spec.adapter_pages,
            clock=lambda: self._now,
            push=push,
        )
        reporter = EngineReporter(
            scheduler,
            prefill_tokens_per_second=1 / spec.cost.prompt_token_s,
            load_seconds=8 * spec.cost.page_bytes / spec.cost.link,
        )
        self._nodes[engine_id] = _Node(engine, reporter)
        self._report(engine_id, self._nodes[engine_id])
        self._note_engines()

    def _report(self, engine_id: str, node: _Node) -> None:
        node.reported_at = self._now
        report = node.reporter.report(num_received=node.num_received, now=self._now)
        self._view.apply(engine_id, report, self._now)

    def _take(self, engine_id: str, event: Event) -> None:
        node = self._nodes.get(engine_id)
        if node is None:  # released: the event is a load that no request waits for
            return
        for output in node.engine.take(event):
            index = output.request_id
            timeline = self._result.timelines[index]
            self._num_generated[index] += len(output.token_ids)
            if timeline.first_token_s is None:
                timeline.first_token_s = self._now
                ttft_s = self._now - timeline.request.arrival_s
                self._recent.append(ttft_s <= self._spec.objective_s)
            if output.finish_reason:
                self._end(node, index)
        self._plan(engine_id)
        if self._now - node.reported_at >= REPORT_S:
            self._report(engine_id, node)

    def _plan(self, engine_id: str) -> None:
        node = self._nodes[engine_id]
        for output in node.engine.plan():
            self._end(node, output.request_id, output.error_code)

    def _end(self, node: _Node, index: int, error_code: str = "") -> None:
        node.requests.discard(index)
        timeline = self._result.timelines[index]
        timeline.end_s, timeline.error_code = self._now, error_code

    # Scale

    def _start_due_engines(self) -> None:
        while self._starting and self._starting[0] <= self._now:
            self._starting.pop(0)
            self._start_engine()

    def _decide(self, scale: ScalePolicy) -> None:
        self._next_scale = self._now + self._spec.scale_every_s
        for engine_id, node in self._nodes.items():
            self._report(engine_id, node)
        decision = scale.decide(
            self._view.summaries(self._now),
            num_starting=len(self._starting),
            num_queued=len(self._queue),
            attainment=sum(self._recent) / len(self._recent) if self._recent else 1.0,
            now=self._now,
        )
        if decision is None:
            return
        if decision.release:
            self._empty(decision.release)
        else:
            self._starting.append(self._now + self._spec.start_s)
        self._note_engines()

    def _empty(self, engine_id: str) -> None:
        """Move an engine's requests to the head of the queue, by age, and let it go."""
        node = self._nodes.pop(engine_id)
        self._view.remove(engine_id)
        moved = sorted(node.requests)
        for index in moved:
            request = self._trace[index]
            if self._num_generated[index]:
                computed = request.num_prompt_tokens + self._num_generated[index]
                self._result.num_recomputed_tokens += computed
            node.engine.scheduler.abort(index)
        self._queue.extendleft(reversed(moved))
        self._result.num_moves += len(moved)
        self._count(node)

    def _num_loads(self) -> int:
        present = (n.engine.scheduler.stats()["num_adapter_loads"] for n in self._nodes.values())
        return self._result.num_loads + sum(present)

    def _count(self, node: _Node) -> None:
        stats = node.engine.scheduler.stats()
        self._result.num_loads += stats["num_adapter_loads"]
        self._result.num_preemptions += stats["num_preemptions"]
        self._result.num_new_tokens += stats["num_generated_tokens"]

    def _note_engines(self) -> None:
        number = len(self._nodes) + len(self._starting)
        self._result.engines_in_use.append((self._now, number))


def _hash(asked: SimRequest) -> str:
    return "" if asked.adapter is None else str(asked.adapter)
