"""The scheduler's turn: drain messages, commit results, plan and send steps, send outputs.

The same object runs over sockets (scheduler_proc.py) and in one thread (in_process.py).
"""

import logging
from array import array
from collections.abc import Hashable
from typing import Any

from loraplex.engine.ipc.channel import Channel, PeerGoneError, SlowPeerError, worker_identity
from loraplex.engine.ipc.messages import (
    AbortRequests,
    AdapterCommand,
    AdapterReply,
    AddRequest,
    EngineInfo,
    FrontendHello,
    SequenceOutput,
    StatsQuery,
    StatsReply,
    StepOutputs,
)
from loraplex.scheduler.request import Request, RequestRefused, RequestUpdate
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    StepResult,
)

logger = logging.getLogger("loraplex.scheduler")


class SchedulerLoop:
    """A request is known to the scheduler as (its frontend, the id that the frontend gave it).

    Every worker gets every command and plan, in one order; rank 0 answers for all of them.
    """

    def __init__(
        self, scheduler: Scheduler, *, info: EngineInfo, frontends: Channel, workers: Channel
    ) -> None:
        self._scheduler = scheduler
        self._info = info
        self._frontends = frontends
        self._workers = workers
        self._worker_names = [worker_identity(worker.rank) for worker in info.workers]
        self._outputs: dict[bytes, list[SequenceOutput]] = {}

    def turn(self) -> None:
        """Do everything that can be done now; never waits."""
        for peer, message in self._workers.receive():
            if peer == self._worker_names[0]:
                self._on_worker(message)
        for peer, message in self._frontends.receive():
            self._on_frontend(peer, message)
        self._send_plans()
        self._publish()

    def _send_plans(self) -> None:
        while True:
            plan = self._scheduler.plan()
            for command in self._scheduler.take_commands():
                self._send_to_workers(command)
            if plan is None:
                return
            self._send_to_workers(plan)

    def _send_to_workers(self, message: object) -> None:
        for name in self._worker_names:
            self._workers.send(message, name)

    def _on_worker(self, message: object) -> None:
        match message:
            case StepResult():
                self._collect(self._scheduler.commit(message))
            case AdapterInspected():
                self._scheduler.on_adapter_inspected(message)
            case AdapterLoaded():
                self._scheduler.on_adapter_loaded(message)
            case AdapterEvicted():
                self._scheduler.on_adapter_evicted(message)
            case _:
                raise TypeError(f"a worker sent {type(message).__name__}")

    def _on_frontend(self, peer: bytes, message: object) -> None:
        match message:
            case AddRequest():
                self._add(peer, message)
            case AbortRequests():
                for request_id in message.request_ids:
                    self._scheduler.abort((peer, request_id))
            case AdapterCommand():
                self._run_adapter_command(peer, message)
            case StatsQuery():
                self._send(peer, StatsReply(message.query_id, self._scheduler.stats()))
            case FrontendHello():
                self._send(peer, self._info)
            case _:
                raise TypeError(f"a frontend sent {type(message).__name__}")

    def _add(self, peer: bytes, message: AddRequest) -> None:
        request = Request(
            request_id=(peer, message.request_id),
            prompt_token_ids=message.prompt_token_ids,
            sampling=message.sampling,
            adapter=message.adapter,
            salt=message.salt,
            priority=message.priority,
            use_prefix_cache=message.use_prefix_cache,
        )
        try:
            self._scheduler.add(request)
        except RequestRefused as refusal:
            self._outputs.setdefault(peer, []).append(
                SequenceOutput(
                    message.request_id,
                    array("i"),
                    finish_reason="error",
                    error=refusal.text,
                    error_code=refusal.code,
                )
            )

    def _run_adapter_command(self, peer: bytes, message: AdapterCommand) -> None:
        scheduler, adapters = self._scheduler, []
        key: Hashable = (peer, message.command_id)
        try:
            match message.op:
                case "load":
                    scheduler.load_adapter(message.name, message.path, key)
                    return  # answered by an adapter update
                case "pin":
                    scheduler.pin_adapter(message.name, key)
                    return  # the same
                case "register":
                    adapters = [scheduler.register_adapter(message.name, message.path)]
                case "unload":
                    adapters = [scheduler.unload_adapter(message.name)]
                case "unpin":
                    adapters = [scheduler.unpin_adapter(message.name)]
                case "list":
                    adapters = scheduler.list_adapters(message.name)
                case _:
                    raise RequestRefused("bad_request", f"unknown adapter command {message.op!r}")
        except RequestRefused as refusal:
            self._send(peer, AdapterReply(message.command_id, refusal.text, refusal.code))
            return
        self._send(peer, AdapterReply(message.command_id, adapters=adapters))

    def _collect(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            peer, request_id = _split(update.request_id)
            self._outputs.setdefault(peer, []).append(
                SequenceOutput(
                    request_id,
                    update.token_ids,
                    finish_reason=update.finish_reason,
                    stop_token_id=update.stop_token_id,
                    error=update.error,
                    error_code=update.error_code,
                    num_cached_tokens=update.num_cached_tokens,
                    logprobs=update.logprobs,
                    prompt_logprobs=update.prompt_logprobs,
                )
            )

    def _publish(self) -> None:
        """One message for each frontend that has news."""
        self._collect(self._scheduler.take_updates())
        for peer, outputs in self._outputs.items():
            self._send(peer, StepOutputs(outputs))
        self._outputs.clear()
        for update in self._scheduler.take_adapter_updates():
            peer, command_id = _split(update.reply_key)
            adapters = [update.adapter] if update.adapter else []
            self._send(peer, AdapterReply(command_id, update.error, update.error_code, adapters))

    def _send(self, peer: bytes, message: object) -> None:
        try:
            self._frontends.send(message, peer)
        except SlowPeerError:
            raise
        except PeerGoneError as error:
            logger.debug("%s", error)  # the supervisor hears of its end as well, and acts


def _split(key: Hashable) -> Any:
    """(frontend, id): what SchedulerLoop gave the scheduler as a key."""
    return key
