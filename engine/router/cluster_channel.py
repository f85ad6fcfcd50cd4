"""A scheduler to its frontend, and a frontend to the schedulers of many engines.

The router's frontend is the one of a single engine: it checks, tokenizes, makes text and finds stop
strings. Below it this channel keeps each sequence with its tokens so far and places it. So an
engine that dies or is emptied costs a recompute elsewhere, and clients notice nothing but a pause.
"""

import itertools
import logging
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from loraplex.engine.ipc.channel import RECEIVE_LIMIT, Channel, PeerGoneError
from loraplex.engine.ipc.codec import WireError
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
from loraplex.engine.router.adapter_book import AdapterBook
from loraplex.engine.router.adapter_log import AdapterLog
from loraplex.engine.router.broadcasts import Answer, Broadcasts
from loraplex.engine.router.engine_watch import GIVE_UP_S, NO_ENGINE_S, EngineWatch
from loraplex.engine.router.hash_questions import HashQuestions
from loraplex.engine.router.request_book import MAX_DEATHS, RequestBook
from loraplex.engine.router.routed_request import RoutedRequest
from loraplex.engine.router.router_counts import RouterCounts
from loraplex.engine.router.router_queue import make_waiting_queue
from loraplex.engine.router.router_status import describe_engines
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AddRequest, SequenceOutput, StepOutputs
from loraplex.scheduler.placement.attainment import Attainment
from loraplex.scheduler.placement.cluster_view import ClusterView
from loraplex.scheduler.placement.demand import AdapterDemand
from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.placement.engine_summary import EngineSummary
from loraplex.scheduler.placement.placement import place
from loraplex.scheduler.placement.placement_request import PlacementRequest

logger = logging.getLogger("loraplex.router")


class ClusterChannel:
    """The Channel of the router's frontend. It never waits; call receive() often.

    Attributes:
        book: the unfinished sequences. Callers only read it.
        adapters: what clients have registered.
        attainment: of the objective, by the first tokens lately.
        scale: what the autoscaler has done, for the statistics.
    """

    def __init__(
        self,
        name: str,
        *,
        placement: str,
        block_tokens: int,
        scheduler: SchedulerConfig,
        adapter_log: AdapterLog | None = None,
        counts: RouterCounts | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        """Makes a channel without engines. The first one's EngineInfo goes to the frontend.

        Args:
            name: tells engines a router that has restarted from another router.
            scheduler: of the engines: objective and policy, and the length of the router's queue.
            adapter_log: what clients have told all routers of the cluster; None: there is one.
            counts: this router's; None: there is one router.
        """
        self.book = RequestBook(make_waiting_queue(scheduler))
        self.adapters = AdapterBook(adapter_log)
        self.attainment = Attainment(scheduler.ttft_slo_s)
        self.scale: dict[str, Any] = {}
        self._has_told_info = False
        self._name = name
        self._placement = placement
        self._block_tokens = block_tokens
        self._max_queue_len = scheduler.max_queue_len
        self._objective_s = scheduler.ttft_slo_s
        self._clock = clock
        self._random = random or Random()
        self._view = ClusterView()
        self._demand = AdapterDemand()
        self._broadcasts = Broadcasts()
        self._engines: dict[str, Channel] = {}
        self._num_lost_engines = 0
        self._counts = counts or RouterCounts()
        self._watch = EngineWatch(clock())
        self._refusing: set[str] = set()  # engines whose queue was full at their last report
        self._own_ids = itertools.count(-1, -1)  # of the router's own commands
        self._hashes = HashQuestions(self._own_ids)
        self._answers: deque[Any] = deque()

    # Engines

    def add_engine(self, engine_id: str, channel: Channel) -> None:
        """Connects an engine; it gets requests from its first report on.

        Raises ValueError if the id is in use.
        """
        if engine_id in self._engines:
            raise ValueError(f"engine {engine_id} is connected already")
        self._engines[engine_id] = channel
        self._watch.hear(engine_id, self._clock())
        self._tell(engine_id, FrontendHello(self._name))
        for command in self.adapters.replay(next(self._own_ids)):
            self._tell(engine_id, command)
        self._tell(engine_id, ReportLoad())

    def lose_engine(self, engine_id: str, reason: str) -> None:
        """Sends the requests of an engine that is gone elsewhere. Unknown ids do no harm."""
        if self._engines.pop(engine_id, None) is None:
            return
        is_released = self._view.is_draining(engine_id)
        self._num_lost_engines += not is_released
        self._watch.remove(engine_id)
        self._refusing.discard(engine_id)
        self._view.remove(engine_id)
        self._hashes.lose_engine(engine_id)
        if not is_released:
            self._fail_causes_of_death(engine_id)
        attempts = self.book.recall(engine_id)
        text, level = f"{len(attempts)} requests go on elsewhere", logging.WARNING
        if is_released and not attempts:
            level = logging.INFO
        logger.log(level, "%s is gone (%s): %s", engine_id, reason, text)
        self._answer(self._broadcasts.lose_engine(engine_id))
        self._watch.lacks_engine(self._is_open, self._clock())

    def drain_engine(self, engine_id: str) -> None:
        """Moves an engine's requests elsewhere and sends it no more. Raises KeyError if unknown."""
        channel = self._engines[engine_id]
        self._view.drain(engine_id)
        self._watch.lacks_engine(self._is_open, self._clock())
        attempts = self.book.recall(engine_id)
        if attempts:
            self._send_to(engine_id, channel, AbortRequests(attempts))

    def summaries(self) -> list[EngineSummary]:
        """Returns the load of the engines that have reported."""
        return self._view.summaries(self._clock())

    @property
    def _is_open(self) -> bool:
        """Tells whether any engine may get requests."""
        return any(not self._view.is_draining(engine_id) for engine_id in self._engines)

    @property
    def has_answers(self) -> bool:
        """Tells whether receive() has something, though no engine sends."""
        return bool(self._answers)

    @property
    def engine_ids(self) -> list[str]:
        """Connected engines."""
        return list(self._engines)

    # The frontend's side

    def send(self, message: object, peer: bytes = b"") -> None:
        """Takes a message of the frontend."""
        match message:
            case AddRequest():
                self._add(message)
            case AbortRequests():
                self._abort(message.request_ids)
            case AdapterCommand() | StatsQuery():
                for engine_id in self.engine_ids:
                    self._tell(engine_id, message)
                self._answer(self._broadcasts.ask(message, self.engine_ids))
            case _:
                raise TypeError(f"the frontend sent {type(message).__name__}")

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[tuple[bytes, Any]]:
        """Hears the engines, places what waits, and returns what there is for the frontend."""
        self._watch.begin_look(self._clock())
        for engine_id, channel in list(self._engines.items()):
            try:
                messages = channel.receive(limit)
            except WireError as error:
                self.lose_engine(engine_id, f"it does not speak this router's protocol: {error}")
                continue
            for _, message in messages:
                self._on_engine(engine_id, message)
        self._give_up_silent()
        self._dispatch()
        self._counts.write(self.book, self._num_lost_engines)
        count = min(limit, len(self._answers))
        return [(b"", self._answers.popleft()) for _ in range(count)]

    def close(self) -> None:
        """Closes the channels of all engines."""
        for channel in self._engines.values():
            close = getattr(channel, "close", None)
            if close is not None:
                close()

    def _add(self, message: AddRequest) -> None:
        if self.book.num_waiting >= self._max_queue_len:
            text = f"{self._max_queue_len} requests wait for an engine already; try again later"
            self._fail(message.request_id, "queue_full", text)
            return
        now = self._clock()
        request = self.book.add(message, now, self.adapters.source)
        num_tokens = request.num_tokens + message.sampling.max_tokens
        self._demand.observe(message.home_adapter, num_tokens, now)
        self._dispatch()

    def _abort(self, request_ids: "array[int]") -> None:
        attempts: dict[str, array[int]] = {}
        for request_id in request_ids:
            at = self.book.end(request_id)
            if at is not None:
                attempts.setdefault(at[0], array("q")).append(at[1])
        for engine_id, ids in attempts.items():
            self._tell(engine_id, AbortRequests(ids))

    def _fail(self, request_id: int, code: str, text: str) -> None:
        end = SequenceOutput(
            request_id, array("i"), finish_reason="error", error=text, error_code=code
        )
        self._answers.append(StepOutputs(array("q"), array("i"), [end]))

    # The engines' side

    def _on_engine(self, engine_id: str, message: object) -> None:
        self._watch.hear(engine_id, self._clock())
        match message:
            case StepOutputs():
                outputs = self.book.on_outputs(message)
                self._refusing |= self.book.take_refusing()
                now = self._clock()
                for request in self.book.take_begun():
                    self.attainment.observe(now - request.arrived_at, now)
                if outputs is not None:
                    self._answers.append(outputs)
            case EngineInfo():
                if not self._has_told_info:
                    self._has_told_info = True
                    self._answers.append(message)
            case EngineReport():
                self._view.apply(engine_id, message, self._clock())
                self._refusing.discard(engine_id)
            case ReplyRows() | StatsReply():
                self._answer(self._broadcasts.on_reply(engine_id, message))
            case AdapterReply():
                self._on_adapter_reply(engine_id, message)

    def _on_adapter_reply(self, engine_id: str, reply: AdapterReply) -> None:
        self._hashes.on_reply(reply.command_id)
        command = self._broadcasts.command(reply.command_id)
        if command is not None and not reply.error:
            self.adapters.on_done(command)
        if command is None or command.op != "unload":
            for row in reply.adapters:
                self.adapters.learn(row)
        self._answer(self._broadcasts.on_reply(engine_id, reply))

    def _answer(self, answer: Answer) -> None:
        for message in answer:
            if isinstance(message, StatsReply):
                message.stats["router"] = self._stats()
        self._answers.extend(answer)

    def _stats(self) -> dict[str, Any]:
        self._counts.write(self.book, self._num_lost_engines)
        return {
            "placement": self._placement,
            **self._counts.total(),
            "scale": self.scale,
            "engines": describe_engines(self._engines, self.summaries()),
        }

    def _give_up_silent(self) -> None:
        now = self._clock()
        for engine_id in self._watch.silent(now):
            self.lose_engine(engine_id, f"no message for {GIVE_UP_S:g} s")
        if self._watch.lacks_engine(self._is_open, now):
            text = f"no engine is up, and none came within {NO_ENGINE_S:g} s"
            self._end_dead(self.book.waiting_since(now - NO_ENGINE_S), text)

    def _fail_causes_of_death(self, engine_id: str) -> None:
        """Fails what many engines have died with: it would end the others too, one by one."""
        doomed = self.book.count_death(engine_id)
        if doomed:
            logger.error("%d requests fail: %d engines died with them", len(doomed), MAX_DEATHS)
        text = f"{MAX_DEATHS} engines have died or hung with this request; no other gets it"
        self._end_dead(doomed, text)

    def _end_dead(self, requests: Iterable[RoutedRequest], text: str) -> None:
        for request in requests:
            self.book.end(request.message.request_id)
            self._fail(request.message.request_id, "engine_dead", text)

    def _tell(self, engine_id: str, message: object) -> None:
        channel = self._engines.get(engine_id)
        if channel is not None:
            self._send_to(engine_id, channel, message)

    def _send_to(self, engine_id: str, channel: Channel, message: object) -> None:
        try:
            channel.send(message)
        except PeerGoneError as error:
            self.lose_engine(engine_id, str(error))

    # Placement

    def _dispatch(self) -> None:
        while (request := self.book.first_waiting()) is not None:
            engine_id = self._place(request)
            if engine_id is None:
                return
            self._tell(engine_id, self.book.start(request, engine_id))
            name = request.message.home_adapter
            if name and not self.adapters.content_hash(name):
                question = self._hashes.ask(engine_id, name)
                if question is not None:
                    self._tell(engine_id, question)

    def _place(self, request: RoutedRequest) -> str | None:
        name = request.message.home_adapter
        needs = PlacementRequest(
            content_hash=self.adapters.content_hash(name),
            prompt_tokens=request.num_tokens,
            pages=math.ceil(request.num_tokens / self._block_tokens),
            num_candidates=self._demand.num_candidates(name, len(self._view)),
            objective_s=self._objective_s,
            home=name,
        )
        able = [e for e in self.summaries() if e.engine_id not in self._refusing]
        decision = place(needs, able, self._placement, self._random)
        if decision is None:
            return None
        self._view.on_sent(decision.engine_id, needs)
        return decision.engine_id
