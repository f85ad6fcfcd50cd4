"""The scheduler: owner of every page and every request. Plain Python, no device, no sockets.

Each turn the engine drains its messages, calls `plan()`, sends `take_commands()` and then the plan
to every worker, and hands the oldest result to `commit()`. Up to `max_steps_in_flight` plans may be
out: a decoding request is then planned for its next token before the last one's id is known. What
is freed may be given away by the very next plan, since workers execute commands and plans in order.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.adapters.manager import AdapterManager, AdapterUpdate
from loraplex.scheduler.adapters.version import AdapterState, AdapterVersion, failure
from loraplex.scheduler.admission import Admission
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.integrity import check_integrity
from loraplex.scheduler.planner import StepPlanner
from loraplex.scheduler.policies.registry import make_policy
from loraplex.scheduler.request import Request, RequestRefused, RequestState, RequestUpdate
from loraplex.scheduler.request_checks import capacity_problem, check_lengths
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.stats import SchedulerStats
from loraplex.scheduler.step_builder import StepBuilder
from loraplex.scheduler.step_results import take_result
from loraplex.scheduler.waiting_queue import WaitingQueue
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    UnloadAdapter,
)

Command = InspectAdapter | LoadAdapter | UnloadAdapter | DropAdapter


class Scheduler:
    """Iteration-level batching of prefill and decode over one pool of pages."""

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
        self._clock = clock
        self._policy = make_policy(config)
        self._stats = SchedulerStats()
        self._requests: dict[Hashable, Request] = {}
        self._num_added = 0
        self._waiting = WaitingQueue(self._policy)
        self._running = RunningRequests(config.max_num_seqs)
        self._in_flight: deque[StepBuilder] = deque()
        self._commands: list[Command] = []
        self._updates: list[RequestUpdate] = []
        self._memory = page_manager(
            num_pages=num_pages,
            block_tokens=memory.block_tokens,
            max_adapter_slots=memory.max_adapter_slots,
            enable_prefix_caching=memory.enable_prefix_caching,
            unload=self._unload,
        )
        self._admission = Admission(
            memory=self._memory,
            waiting=self._waiting,
            policy=self._policy,
            stats=self._stats,
            base_fingerprint=base_fingerprint,
            send=self._commands.append,
        )
        self._planner = StepPlanner(
            memory=self._memory,
            running=self._running,
            waiting=self._waiting,
            admission=self._admission,
            stats=self._stats,
        )
        self._adapters = AdapterManager(
            memory=self._memory,
            max_slots=memory.max_adapter_slots,
            requests=self._requests,
            send=self._commands.append,
            load=self._admission.begin_load,
            clock=clock,
        )

    # Requests

    def add(self, request: Request) -> None:
        """Accept a request.

        Raises:
            RequestRefused: the queue is full, the adapter is unknown or unusable, or the request
                is invalid or could never run; the code says which.
        """
        try:
            version = self._check(request)
        except RequestRefused:
            self._stats.num_refused += 1
            raise
        self._num_added += 1
        self._stats.num_requests += 1
        request.order = self._num_added
        request.arrival = self._clock()
        request.adapter_version = version
        request.key = request.rank = self._policy.key(request)
        self._policy.on_arrival(request, request.arrival)
        self._requests[request.request_id] = request
        self._adapters.usage_stats.on_accepted(request)
        if version is not None:
            self._adapters.registry.bind(version, request.arrival)
            if version.state is not AdapterState.READY:
                self._waiting.park(request, version)
                return
        self._waiting.push(request)

    def _check(self, request: Request) -> AdapterVersion | None:
        """Refuse what cannot be served; returns the version of its adapter."""
        if request.request_id in self._requests:
            raise RequestRefused("bad_request", f"request id {request.request_id!r} is in use")
        if len(self._waiting) >= self._config.max_queue_len:
            raise RequestRefused(
                "queue_full",
                f"{self._config.max_queue_len} requests wait already; try again later",
            )
        check_lengths(request, self._max_model_len)
        version = self._adapters.registry.resolve(request.adapter) if request.adapter else None
        if refusal := self._capacity_problem(request, version):
            raise RequestRefused("bad_request", refusal)
        return version

    def _capacity_problem(self, request: Request, version: AdapterVersion | None) -> str:
        own = version.content_hash if version else ""
        return capacity_problem(
            request, version, self._memory, self._adapters.pins.num_pages_besides(own)
        )

    def abort(self, request_id: Hashable) -> bool:
        """End a request in any state, without an update; False if it is not there (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, "abort", self._clock())
        return True

    def _end(self, request: Request, reason: str, now: float) -> None:
        del self._requests[request.request_id]
        if request.state is RequestState.RUNNING:
            self._planner.vacate(request, now)
        else:
            self._waiting.remove(request)
            self._admission.unreserve_adapter(request, now)
        request.state = RequestState.FINISHED
        self._policy.on_end(request)
        self._adapters.usage_stats.on_end(request)
        if request.adapter_version is not None:
            self._adapters.registry.unbind(request.adapter_version, now)
        self._stats.finished[reason] += 1

    def _fail(self, request: Request, code: str, text: str, now: float) -> None:
        """End a waiting request with an error that no step caused."""
        self._end(request, "error", now)
        self._updates.append(
            RequestUpdate(request.request_id, finish_reason="error", error=text, error_code=code)
        )

    # Steps

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to run or enough steps are in flight.

        Commands that planning caused are in take_commands() and go out before the plan.
        """
        now = self._clock()
        if len(self._in_flight) >= self._config.max_steps_in_flight:
            self._planner.look_ahead(now)
            return None
        self._adapters.pins.keep(now)
        self._give_up(now)
        blocks = self._memory.blocks
        step = StepBuilder(
            blocks.num_planned, self._config.max_num_batched_tokens, follows=bool(self._running)
        )
        self._planner.fill(step, now)
        while not step.requests and self._fail_if_stuck(now):
            self._planner.fill(step, now)
        if not step.requests:
            return None
        blocks.num_planned += 1
        self._stats.num_scheduled_tokens += sum(step.num_tokens)
        self._in_flight.append(step)
        return step.finish(self._running.take_freed_slots())

    def _give_up(self, now: float) -> None:
        """Fail the waiting requests that the policy has no hope for."""
        for request in self._policy.requests_to_drop(self._waiting, self._planner.context(now)):
            self._stats.num_deadline_drops += 1
            text = (
                f"the first token would have come later than ttft_slo_s "
                f"({self._config.ttft_slo_s} s) after the request; try again when fewer wait"
            )
            self._fail(request, "deadline", text, now)

    def _fail_if_stuck(self, now: float) -> bool:
        """Requests that fit were let in, so with nothing running, loading or in flight the first
        one can start. If it cannot, fail it: an error serves its client better than silence."""
        busy = self._running or self._in_flight or self._admission.num_loading
        if busy or not self._waiting.by_age:
            return False
        order = self._policy.order(self._waiting, self._planner.context(now))
        request = next(order, self._waiting.by_age[0])
        reason = self._capacity_problem(request, request.adapter_version) or "pages are lost"
        self._fail(request, "internal", f"no room to start: {reason}", now)
        return True

    def commit(self, result: StepResult) -> list[RequestUpdate]:
        """Take in the result of the oldest step in flight; returns what it brought to requests.

        Raises:
            ValueError: the result answers no step, or another one.
        """
        if not self._in_flight:
            raise ValueError(f"result of step {result.step_id} came, but no step is in flight")
        step = self._in_flight[0]
        step.check(result)
        self._in_flight.popleft()
        now = self._clock()
        self._policy.on_result(step, now)
        self._adapters.usage_stats.on_result(step, now)
        updates, ended = take_result(step, result, self._memory.kv, self._stats)
        for request in ended:
            self._end(request, request.finish_reason(), now)
        return updates

    # Adapters

    def register_adapter(self, name: str, path: str) -> dict[str, Any]:
        """Remember a path under a name, replacing the name's adapter for new requests."""
        return self._adapters.describe(self._adapters.registry.register(name, path), {})

    def load_adapter(self, name: str, path: str, reply_key: Hashable) -> None:
        """Register and inspect now; the outcome comes in take_adapter_updates()."""
        self._adapters.registry.load(name, path, reply_key)

    def unload_adapter(self, name: str) -> dict[str, Any]:
        """Forget a name; its pages and host memory are freed after the last request that uses
        them.

        Raises:
            RequestRefused: the name is unknown.
        """
        return self._adapters.describe(self._adapters.registry.unload(name), {})

    def pin_adapter(self, name: str, reply_key: Hashable) -> None:
        """Keep what the name means in pages from now on; the outcome, decided once its files are
        inspected, comes in take_adapter_updates(). It is loaded when there is room.

        Raises:
            RequestRefused: the name is unknown, or its adapter could not be read.
        """
        self._adapters.pin(name, reply_key)

    def unpin_adapter(self, name: str) -> dict[str, Any]:
        """Idempotent; RequestRefused if the name is unknown."""
        return self._adapters.describe(self._adapters.unpin(name), {})

    def list_adapters(self, name: str = "") -> list[dict[str, Any]]:
        """The adapter of this name (RequestRefused if it is unknown), or all; see docs/protocol.md.

        All of 10,000 take a tenth of a second, in which no step is planned.
        """
        return self._adapters.describe_all(name, self._running)

    def on_adapter_inspected(self, event: AdapterInspected) -> None:
        """Let the requests that waited for the files go on, or fail them."""
        now = self._clock()
        version = self._adapters.on_inspected(event)
        requests = self._waiting.unpark(version)
        self._waiting.push_all(requests)
        for request in requests:
            if version.state is AdapterState.FAILED:
                self._fail(request, "adapter", failure(version), now)
            elif refusal := self._capacity_problem(request, version):
                self._fail(request, "bad_request", refusal, now)

    def on_adapter_loaded(self, event: AdapterLoaded) -> None:
        """Let the requests that waited for the pages go on, or fail those of the file read."""
        now = self._clock()
        requests, version = self._admission.on_loaded(event, now)
        self._waiting.push_all(requests)
        self._adapters.on_loaded(event, version, requests)
        if event.error:
            for request in [r for r in self._waiting.by_age if r.adapter_version is version]:
                self._fail(request, "adapter", failure(version), now)

    def on_adapter_evicted(self, event: AdapterEvicted) -> None:
        """The workers' host store has it no more: its next load comes from disk."""
        self._adapters.on_evicted(event.content_hash)

    # What goes out

    def take_commands(self) -> list[Command]:
        """Commands for every worker, in order; to be sent before the plan made last."""
        commands = self._commands[:]
        self._commands.clear()
        return commands

    def take_updates(self) -> list[RequestUpdate]:
        """Updates that no step caused: requests that failed while they waited."""
        updates, self._updates = self._updates, []
        return updates

    def take_adapter_updates(self) -> list[AdapterUpdate]:
        """Outcomes of load_adapter() and pin_adapter()."""
        return self._adapters.take_updates()

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def stats(self) -> dict[str, Any]:
        """Load, memory and counters, as plain values."""
        pages = self._memory.num_owned()
        return (
            self._stats.snapshot()
            | {
                "running": len(self._running),
                "waiting": len(self._waiting),
                "waiting_for_adapter": self._waiting.num_parked,
                "steps_in_flight": len(self._in_flight),
                "num_pages": self._memory.blocks.num_usable,
                "pages_free": pages["free"],
                "pages_kv": pages["kv"],
                "pages_prefix": pages["prefix"],
                "pages_adapter": pages["adapter"],
            }
            | self._adapters.stats()
        )

    def check_integrity(self) -> None:
        """Prove that no page, slot, pin or request is lost or leaked; raises IntegrityError."""
        self._memory.check_integrity()
        check_integrity(
            requests=self._requests.values(),
            running=self._running,
            waiting=self._waiting,
            memory=self._memory,
            pinned=self._adapters.pins.reserved(),
        )
        self._adapters.pins.check_integrity()
        self._policy.check_integrity(self._requests.values())

    def _unload(self, adapter_slot: int) -> None:
        self._stats.num_adapter_unloads += 1
        self._commands.append(UnloadAdapter(adapter_slot))
