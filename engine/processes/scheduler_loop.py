"""One turn of the scheduler's process: take messages in, plan and send steps, send outputs.

The same object runs over sockets (scheduler_main.py) and in one thread (in_process.py).
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from loraplex.engine.adapters.tensors.kept_tensors import KeptTensors
from loraplex.engine.grammar.request_queue import GrammarQueue
from loraplex.engine.ipc.channel import Channel, PeerGoneError, SlowPeerError
from loraplex.engine.ipc.messages.frontend import (
    AbortRequests,
    AdapterCommand,
    AdapterReply,
    EngineInfo,
    FrontendHello,
    ReplyRows,
    ReportLoad,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.ipc.messages.pool_map import map_pool
from loraplex.engine.ipc.step_clock import StepClock
from loraplex.engine.processes.load_reports import LoadReports
from loraplex.engine.processes.worker_group import WorkerGroup
from loraplex.scheduler.adapters.tiers import adapters_by_tier
from loraplex.scheduler.frontend_protocol import AddRequest, Outputs
from loraplex.scheduler.request import Request, RequestRefused, report_refusal
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    Message,
    StepResult,
)

MESSAGES_PER_TURN = 32
"""Messages that one turn takes from each side. It bounds the time between two plans: a burst is
taken in over several turns, and steps are planned in between."""

MASK_WAIT_S = 0.001
"""Longest wait for masks before a step is planned. A step is in flight meanwhile. Without the wait,
a constrained request would miss the step that follows its last token's result."""

logger = logging.getLogger("loraplex.scheduler")


class SchedulerLoop:
    """Connects the scheduler with frontends and workers.

    A request is known by its frontend and by the id that the frontend gave it.

    Attributes:
        tensors: keeps adapters that clients send. The owner sets it; None: they are refused.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        info: EngineInfo,
        frontends: Channel,
        workers: WorkerGroup,
        step_clock: StepClock | None = None,
        grammars: GrammarQueue | None = None,
        messages_per_turn: int = MESSAGES_PER_TURN,
        on_hung_rank: Callable[[int, str], None] = lambda rank, how: None,
    ) -> None:
        """`grammars` is None if the engine has no tokenizer. `on_hung_rank` takes a worker rank
        that no longer answers adapter commands, and how it hangs."""
        self.tensors: KeptTensors | None = None
        self._grammars = grammars
        self._scheduler = scheduler
        self._info = info
        self._frontends = frontends
        self._workers = workers
        self._step_clock = step_clock or StepClock()
        self._reports = LoadReports(scheduler)
        self._num_in_flight = 0
        self._messages_per_turn = messages_per_turn
        self._on_hung_rank = on_hung_rank
        self._long_replies: deque[tuple[bytes, Iterator[Message]]] = deque()
        self._frontend_peers: dict[str, bytes] = {}  # by name: the identity in use since its hello

    @property
    def due_s(self) -> float | None:
        """Seconds until turn() must be called though no message comes, or None."""
        waits = [self._reports.due_s, self._workers.deadlines.due_s]
        return min((wait for wait in waits if wait is not None), default=None)

    def turn(self) -> bool:
        """Take in some messages, plan, and send what there is to send; never waits.

        Returns:
            True if there is more to do, so that the next turn should not wait for a message.
        """
        limit = self._messages_per_turn
        for event in self._workers.receive(limit):
            self._on_worker(event)
        from_frontends = self._frontends.receive(limit)
        for peer, message in from_frontends:
            self._on_frontend(peer, message)
        self._take_grammars()
        self._end_overdue_waits()
        self._send_plans()
        self._send_outputs(self._scheduler.outputs.take())
        self._send_adapter_updates()
        self._send_part_of_reply()
        for peer, report in self._reports.take():
            self._send(peer, report)
        has_more = self._workers.has_more or len(from_frontends) == limit
        return has_more or bool(self._long_replies)

    def _end_overdue_waits(self) -> None:
        """Fail those who wait for a rank that does not answer. Its pages stay allocated."""
        for overdue in self._workers.deadlines.look():
            if overdue.is_new:
                logger.warning("adapter at %s: %s", overdue.command.path, overdue.text)
            self._scheduler.fail_waiting(overdue.command, overdue.text)
            if overdue.hang:
                self._on_hung_rank(overdue.rank, overdue.hang)

    def _take_grammars(self) -> None:
        """Pass on the requests whose grammars are compiled, and fail those without a mask."""
        if self._grammars is None:
            return
        if self._num_in_flight:  # else the device would wait too
            self._grammars.wait_for_masks(MASK_WAIT_S)
        for request, error in self._grammars.take_compiled():
            if error:
                refusal = RequestRefused("bad_request", error)
                report_refusal(request, refusal, self._scheduler.outputs)
            else:
                self._add(request)
        for uid, error in self._grammars.take_failed():
            self._scheduler.fail(uid, "bad_request", error)

    def _send_plans(self) -> None:
        while True:
            plan = self._scheduler.plan()
            for command in self._scheduler.take_commands():
                self._workers.send(command)
            if plan is None:
                return
            self._workers.send(plan)
            self._count_steps(1)

    def _count_steps(self, change: int) -> None:
        self._num_in_flight += change
        self._step_clock.set_in_flight(self._num_in_flight)

    def _on_worker(self, message: object) -> None:
        match message:
            case StepResult():
                self._step_clock.step_ended()
                self._count_steps(-1)
                self._send_outputs(self._scheduler.commit(message))
            case AdapterInspected():
                self._scheduler.on_adapter_inspected(message)
            case AdapterLoaded():
                self._scheduler.on_adapter_loaded(message)
            case AdapterEvicted():
                self._scheduler.adapters.on_evicted(message.content_hash)
            case _:
                raise TypeError(f"a worker sent {type(message).__name__}")

    def _on_frontend(self, peer: bytes, message: object) -> None:
        match message:
            case AddRequest():
                self._reports.on_request(peer)
                self._add(Request.from_message(message, peer))
            case AbortRequests():
                for request_id in message.request_ids:
                    if not self._scheduler.abort(request_id, peer) and self._grammars is not None:
                        self._grammars.abort(request_id, peer)
            case AdapterCommand(op="list", name=""):
                self._long_replies.append((peer, self._list_adapters(message.command_id)))
            case AdapterCommand():
                self._run_adapter_command(peer, message)
            case StatsQuery():
                if message.reset_prefix_cache:
                    self._scheduler.memory.kv.reset()
                self._long_replies.append((peer, self._report_stats(message)))
            case ReportLoad():
                self._reports.add(peer)
            case FrontendHello():
                former = self._frontend_peers.get(message.frontend, peer)
                if former != peer:
                    self._drop(former)
                self._frontend_peers[message.frontend] = peer
                self._send(peer, self._info)
            case _:
                raise TypeError(f"a frontend sent {type(message).__name__}")

    def _add(self, request: Request) -> None:
        """Give a request to the scheduler, or have its grammar compiled first."""
        try:
            if request.grammar is None or request.constraint is not None:
                self._scheduler.add(request)
            elif self._grammars is None:
                raise RequestRefused("bad_request", "structured_outputs needs a tokenizer")
            else:
                self._grammars.add(request)
        except RequestRefused as refusal:
            report_refusal(request, refusal, self._scheduler.outputs)

    def _run_adapter_command(self, peer: bytes, message: AdapterCommand) -> None:
        scheduler = self._scheduler
        key: Hashable = (peer, message.command_id)
        try:
            match message.op:
                case "load" if self.tensors is not None and message.memory is not None:
                    source = self.tensors.adopt(message.memory)
                    scheduler.load_adapter(message.name, source, key, message.tenant)
                    return  # answered by an adapter update
                case "load" if message.source is not None:
                    scheduler.load_adapter(message.name, message.source, key, message.tenant)
                    return  # answered by an adapter update
                case "pin":
                    scheduler.pin_adapter(message.name, key, message.tenant)
                    return  # the same
                case "register" if message.source is not None:
                    adapter = scheduler.register_adapter(
                        message.name, message.source, message.tenant
                    )
                case "unload":
                    adapter = scheduler.unload_adapter(message.name, message.tenant)
                case "unpin":
                    adapter = scheduler.unpin_adapter(message.name, message.tenant)
                case "list":
                    adapter = scheduler.adapters.describe_one(message.name, message.tenant)
                case _:
                    raise RequestRefused("bad_request", f"unknown adapter command {message.op!r}")
        except RequestRefused as refusal:
            self._send(peer, AdapterReply(message.command_id, refusal.text, refusal.code))
            return
        self._send(peer, AdapterReply(message.command_id, adapters=[adapter]))

    def _list_adapters(self, command_id: int) -> Iterator[Message]:
        for rows in self._scheduler.adapters.describe_all():
            yield ReplyRows(command_id, rows)
        yield AdapterReply(command_id)

    def _report_stats(self, query: StatsQuery) -> Iterator[Message]:
        scheduler = self._scheduler
        slices = scheduler.adapters.describe_resident()
        if query.by_tier:
            registry = scheduler.adapters.registry
            slices = adapters_by_tier(scheduler.memory.adapters, registry, scheduler.waiting)
        for rows in slices:
            yield ReplyRows(query.query_id, rows)
        pools = [map_pool(scheduler.memory, query.pool_cells)] if query.pool_cells else []
        num_bytes = self.tensors.num_bytes if self.tensors is not None else 0
        stats = scheduler.stats() | {"adapter_tensor_bytes": num_bytes}
        yield StatsReply(query.query_id, stats, pools)

    def _send_part_of_reply(self) -> None:
        """Send the next message of the oldest long reply, one a turn; replies take turns."""
        if not self._long_replies:
            return
        peer, messages = self._long_replies.popleft()
        message = next(messages)
        self._send(peer, message)
        if isinstance(message, ReplyRows):
            self._long_replies.append((peer, messages))

    def _send_outputs(self, outputs: Outputs) -> None:
        for frontend, message in outputs:
            self._send(frontend, message)

    def _send_adapter_updates(self) -> None:
        for update in self._scheduler.adapters.take_updates():
            key: Any = update.reply_key  # as _run_adapter_command made it
            peer, command_id = key
            adapters = [update.adapter] if update.adapter else []
            self._send(peer, AdapterReply(command_id, update.error, update.error_code, adapters))

    def _send(self, peer: Any, message: Message) -> None:
        try:
            self._frontends.send(message, peer)
        except SlowPeerError:
            raise
        except PeerGoneError as error:
            logger.debug("%s", error)
            self._drop(peer)

    def _drop(self, peer: bytes) -> None:
        self._scheduler.abort_all(peer)
        self._reports.remove(peer)
        if self._grammars is not None:
            self._grammars.abort_all(peer)
