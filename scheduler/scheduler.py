"""The scheduler owns every page and every request. Plain Python, no device, no sockets.

Each turn the engine drains its messages, calls `plan()`, sends `take_commands()` and then the plan
to every worker, and hands the oldest result to `commit()`. Up to `max_steps_in_flight` plans may be
out: a decoding request is then planned for its next token before the last one's id is known. The
next plan may reuse pages and slots that were just freed, since workers run everything in order.
"""

import time
from collections.abc import Callable, Hashable
from typing import Any

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.adapters.binding import not_ready
from loraplex.scheduler.adapters.manager import AdapterManager
from loraplex.scheduler.adapters.request_bindings import bind_positions, bind_versions
from loraplex.scheduler.adapters.version import AdapterState, AdapterVersion, failure
from loraplex.scheduler.admission import Admission
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AdapterSource, Outputs, OutputTable
from loraplex.scheduler.integrity import check_integrity
from loraplex.scheduler.planner import StepPlanner
from loraplex.scheduler.policies.registry import make_policy
from loraplex.scheduler.request import Request, RequestRefused, RequestState, report_refusal
from loraplex.scheduler.request_checks import check_lengths, check_queue, check_service
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.stats import SchedulerStats, describe_load
from loraplex.scheduler.step_results import apply_result
from loraplex.scheduler.tenants.tenant_limiter import TenantLimiter
from loraplex.scheduler.waiting_queue import WaitingQueue
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    UnloadAdapter,
    WorkerAdapterCommand,
)


class Scheduler:
    """Batches prefill and decode step by step over one pool of pages.

    Attributes:
        adapters: names, pins and states of adapters, and their lists.
        tenants: their limits and weights.
        outputs: outputs that were not sent to the frontends yet.
        waiting, running: the unfinished requests. Callers only read them.
        memory: owners of the pages. Callers only read it.
        counters: counts since the start. Callers only read them.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        memory: MemoryConfig,
        num_pages: int,
        max_model_len: int,
        base_fingerprint: str,
        clock: Callable[[], float] = time.monotonic,
        page_manager: Callable[..., PageManager] = PageManager,
    ) -> None:
        """`num_pages` counts the null page; `base_fingerprint` names the base model.

        `page_manager` makes the pool's accounts, for benchmarks that compare others with it.
        """
        self._config = config
        self._max_model_len = max_model_len
        self.clock = clock
        self._policy = make_policy(config)
        self.tenants = TenantLimiter(self._policy.set_weights)
        self.counters = self._stats = SchedulerStats()
        self._requests: dict[Hashable, Request] = {}
        self.waiting = WaitingQueue(self._policy)
        self.running = RunningRequests(config.max_num_seqs)
        self._commands: list[WorkerAdapterCommand] = []
        self.outputs = OutputTable()
        self.memory = page_manager(
            num_pages=num_pages,
            block_tokens=memory.block_tokens,
            max_adapter_slots=memory.max_adapter_slots,
            enable_prefix_caching=memory.enable_prefix_caching,
            unload=self._unload,
        )
        self._admission = Admission(
            memory=self.memory,
            waiting=self.waiting,
            policy=self._policy,
            stats=self._stats,
            base_fingerprint=base_fingerprint,
            send=self._commands.append,
        )
        self._planner = StepPlanner(
            config=config,
            memory=self.memory,
            running=self.running,
            waiting=self.waiting,
            admission=self._admission,
            policy=self._policy,
            stats=self._stats,
            fail=self._fail,
        )
        self.adapters = AdapterManager(
            memory=self.memory,
            max_slots=memory.max_adapter_slots,
            requests=self._requests,
            running=self.running,
            send=self._commands.append,
            load=self._admission.begin_load,
            clock=clock,
            max_names_per_tenant=config.max_adapters_per_tenant,
        )

    # Requests

    def add(self, request: Request) -> None:
        """Accept a request; its outputs come from commit() and `outputs`.

        Raises:
            RequestRefused: the queue is full, the adapter is unknown or unusable, or the request
                is invalid or could never run; the code says which.
        """
        try:
            self._check(request)
        except RequestRefused:
            self._stats.num_refused += 1
            raise
        self._stats.num_requests += 1
        request.order = self._stats.num_requests
        request.arrival = self.clock()
        request.key = request.rank = self._policy.key(request)
        self._policy.on_arrival(request, request.arrival)
        request.outputs = self.outputs.of(request.frontend)
        self._requests[request.uid] = request
        self.adapters.on_accepted(request)
        if version := not_ready(request.bindings):
            self.waiting.park(request, version)
            return
        self._prepare(request, request.arrival)
        self.waiting.push(request)

    def _prepare(self, request: Request, now: float) -> None:
        """Complete a request whose adapters are all READY, before it is queued.

        One that another engine has begun gets the state of a preempted one.
        """
        bind_positions(request)
        if request.is_resumed:
            request.rank = self._policy.rank(request, now)
            request.admitted_at = now
            self._policy.on_admitted(request, now)

    def _check(self, request: Request) -> None:
        """Refuse what cannot be served, and bind the request to the versions of its adapters."""
        if request.uid in self._requests:
            raise RequestRefused("bad_request", f"request id {request.request_id!r} is in use")
        check_queue(request, self.waiting, self._config.max_queue_len)
        check_lengths(request, self._max_model_len)
        bind_versions(request, self.adapters.registry)
        check_service(request, self.memory, self.adapters.pins.besides(request.versions))
        self.tenants.accept(request, self.clock())

    def abort_all(self, frontend: Hashable) -> None:
        """End every request of a frontend, without output."""
        for request in [r for r in self._requests.values() if r.frontend == frontend]:
            self._end(request, "abort", self.clock())

    def abort(self, request_id: int, frontend: Hashable = b"") -> bool:
        """End a request in any state, without output; False if it has ended or never was."""
        if (request := self._requests.get((frontend, request_id))) is None:
            return False
        self._end(request, "abort", self.clock())
        return True

    def _end(self, request: Request, reason: str, now: float) -> None:
        del self._requests[request.uid]
        if request.state is RequestState.RUNNING:
            self._planner.vacate(request, now)
        else:
            self.waiting.remove(request)
            self._admission.unreserve_adapters(request, now)
        request.state = RequestState.FINISHED
        self._policy.on_end(request)
        self.adapters.on_end(request, now)
        self.tenants.on_end(request, now)
        self._stats.finished[reason] += 1

    def _fail(self, request: Request, code: str, text: str, now: float) -> None:
        """End a request with an error that no step caused."""
        self._refuse(request, RequestRefused(code, text), now)

    def _refuse(self, request: Request, refusal: RequestRefused, now: float) -> None:
        self._end(request, "error", now)
        report_refusal(request, refusal, self.outputs)

    def fail(self, uid: Hashable, code: str, text: str) -> None:
        """End an unfinished request with an error; one that has ended does no harm."""
        if (request := self._requests.get(uid)) is not None:
            self._fail(request, code, text, self.clock())

    # Steps

    def plan(self) -> StepPlan | None:
        """Plan the next step; None if nothing can run or enough steps are in flight.

        The commands that planning caused are in take_commands() and go out before the plan.
        """
        now = self.clock()
        if self._planner.has_capacity:
            self.adapters.pins.keep(now)
        return self._planner.plan(now)

    def commit(self, result: StepResult) -> Outputs:
        """Take in the result of the oldest step in flight; returns the outputs not taken yet.

        Raises:
            ValueError: the result answers no step, or another one.
        """
        step = self._planner.pop_oldest(result)
        now = self.clock()
        self._policy.on_result(step, now)
        self.adapters.usage_stats.on_result(step, now)
        for request, reason in apply_result(step, result, self.memory.kv, self._stats):
            self._end(request, reason, now)
        return self.outputs.take()

    # Adapters. RequestRefused says that `tenant`, unless it is the operator (""), may not do this.

    def register_adapter(
        self, name: str, source: AdapterSource, tenant: str = ""
    ) -> dict[str, Any]:
        """Remember a folder under a name, replacing the name's adapter for new requests."""
        return self.adapters.describe(self.adapters.registry.register(name, source, tenant), {})

    def load_adapter(
        self, name: str, source: AdapterSource, reply_key: Hashable, tenant: str = ""
    ) -> None:
        """Register and inspect now; the result comes in adapters.take_updates()."""
        self.adapters.registry.load(name, source, reply_key, tenant)

    def unload_adapter(self, name: str, tenant: str = "") -> dict[str, Any]:
        """Forget a name; RequestRefused if it is unknown. Its pages and host memory are freed
        after the last request that uses them."""
        return self.adapters.describe(self.adapters.registry.unload(name, tenant), {})

    def pin_adapter(self, name: str, reply_key: Hashable, tenant: str = "") -> None:
        """Keep an adapter in pages from now on; it is loaded when there is room. RequestRefused if
        the name is unknown or its files could not be read. The result comes in
        adapters.take_updates() once the files are inspected."""
        self.adapters.pin(name, reply_key, tenant)

    def unpin_adapter(self, name: str, tenant: str = "") -> dict[str, Any]:
        """Undo pin_adapter(). Idempotent; RequestRefused if the name is unknown."""
        return self.adapters.describe(self.adapters.unpin(name, tenant), {})

    def on_adapter_inspected(self, event: AdapterInspected) -> None:
        """Let the requests that waited for the files go on, or fail them."""
        now = self.clock()
        version = self.adapters.on_inspected(event)
        requests = self.waiting.unpark(version)
        if version.state is not AdapterState.READY:
            self.waiting.push_all(requests)
            self._fail_users(version, now)
            return
        complete: list[Request] = []
        for request in requests:
            if other := not_ready(request.bindings):
                self.waiting.park(request, other)
            else:
                self._prepare(request, now)
                complete.append(request)
        self.waiting.push_all(complete)
        for request in complete:
            try:
                check_service(request, self.memory, self.adapters.pins.besides(request.versions))
            except RequestRefused as refusal:
                self._refuse(request, refusal, now)

    def _fail_users(self, version: AdapterVersion, now: float) -> None:
        """Fail all waiting requests of an adapter that cannot be served."""
        for request in [r for r in self.waiting if r.uses(version)]:
            self._fail(request, "adapter", failure(version, tenant=request.tenant), now)

    def on_adapter_loaded(self, event: AdapterLoaded) -> None:
        """Let the requests that waited for the pages go on, or fail those of the file read."""
        now = self.clock()
        requests, version = self._admission.on_loaded(event, now)
        self.waiting.push_all(requests)
        self.adapters.on_loaded(event, version, requests)
        if event.error:
            self._fail_users(version, now)

    def fail_waiting(self, command: InspectAdapter | LoadAdapter, why: str) -> None:
        """Fail the requests, loads and pins that wait for the answer to a command.

        The command stays open. A load keeps its slot and pages, which a worker may still write, and
        an answer that comes late counts.
        """
        for event in self.adapters.fail_waiting(command, why):
            for request in [r for r in self.waiting if r.parked_on is not None]:
                if (version := request.version_of(event)) is not None:
                    text = failure(version, why=why, tenant=request.tenant)
                    self._fail(request, "adapter", text, self.clock())

    # Commands and state

    def take_commands(self) -> list[WorkerAdapterCommand]:
        """Returns the commands for every worker, in order; they go out before the last plan."""
        commands = self._commands[:]
        self._commands.clear()
        return commands

    @property
    def num_prompt_tokens_in_flight(self) -> int:
        """Prompt tokens that the steps in flight compute."""
        return self._planner.num_prompt_tokens_in_flight

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def stats(self) -> dict[str, Any]:
        """Returns load, memory and counters as plain values, in constant time."""
        load = describe_load(self.memory, self.running, self.waiting, self._planner.num_in_flight)
        return self._stats.snapshot() | load | self.adapters.stats()

    def check_integrity(self) -> None:
        """Prove that no page, slot, pin or request is lost or leaked; raises IntegrityError."""
        self.memory.check_integrity()
        check_integrity(
            requests=self._requests.values(),
            running=self.running,
            waiting=self.waiting,
            memory=self.memory,
            pinned=self.adapters.pins.reserved(),
        )
        self.adapters.pins.check_integrity()
        self.adapters.registry.check_integrity()
        self._policy.check_integrity(self._requests.values())
        self.tenants.check_integrity(self._requests.values())

    def _unload(self, adapter_slot: int) -> None:
        self._stats.num_adapter_unloads += 1
        self._commands.append(UnloadAdapter(adapter_slot))
