"""Runs a frontend on an event loop, beside the HTTP server."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from loraplex.engine.frontend.clients import Requests
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.frontend.statistics.frontend_counts import FrontendCounts
from loraplex.engine.ipc.channel import Channel, Wakeup
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.ipc.messages.lifecycle import ChildStart
from loraplex.engine.ipc.step_clock import StepClock
from loraplex.engine.processes.frontend_main import seed_salt
from loraplex.entrypoints.http.current_tenant import current_tenant
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.exchange import Answer, Exchange, ExchangeTable, Query
from loraplex.entrypoints.http.requests.request_ids import prompt_ids

TICK_S = 1.0
TURN_S = 0.01


class EngineLink:
    """Connects the event loop with the scheduler and the frontend.

    Use it from the event loop's thread alone.

    Attributes:
        config: the engine's configuration.
        codec: tokenizer and chat template, None if clients send and receive token ids.
        info: the engine's limits, None until the engine is ready.
        created: Unix time of the server's start, in seconds.
        stop_reason: why the engine serves no longer; empty while it does.
    """

    def __init__(
        self,
        start: ChildStart,
        *,
        codec: TextCodec | None,
        scheduler: Channel,
        has_answers: Callable[[], bool],
        wakeup: Wakeup,
        step_clock: str,
    ) -> None:
        """Makes a link that waits for the engine.

        Args:
            start: names the process, and the folder of the engine's processes.
            scheduler: its first message is EngineInfo.
            has_answers: tells whether the scheduler has sent something.
            step_clock: file of the scheduler's StepClock; "": there is none.
        """
        self._start = start
        self._step_clock = step_clock
        self.config = start.config
        self.codec = codec
        self.info: EngineInfo | None = None
        self.created = int(time.time())
        self.stop_reason = ""
        self._scheduler = scheduler
        self._has_answers = has_answers
        self._wakeup = wakeup
        self._frontend: Frontend | None = None
        self._table: ExchangeTable | None = None
        self._is_due = False  # receive() is scheduled
        self._loop = asyncio.get_running_loop()
        self._info_came = asyncio.Event()
        self._failed: asyncio.Future[None] = self._loop.create_future()

    @property
    def frontend(self) -> Frontend:
        """The frontend.

        Raises:
            HttpError: the engine has not started yet, or serves no longer (status 503).
        """
        if self._frontend is None:
            raise HttpError(503, "the engine is starting: try again later")
        if self.stop_reason:
            raise HttpError(503, self.stop_reason)
        return self._frontend

    def sum_counts(self) -> FrontendCounts:
        """Returns the counts of all frontends of the engine, or of the cluster's routers."""
        return FrontendCounts.sum_in(self._start.run_dir)

    def check_serving(self) -> None:
        """Raises HttpError (status 503) while the engine starts or stops."""
        if self.frontend.gate.is_closing:
            raise HttpError(503, "the server is stopping: send requests to another one")

    async def wait_for_info(self) -> None:
        """Returns when the engine is ready."""
        await self._info_came.wait()

    async def wait_for_failure(self) -> None:
        """Never returns. Raises the error that a message of the scheduler caused."""
        await self._failed

    async def start(self, answer: Answer, messages: list[dict[str, Any]]) -> Exchange:
        """Starts one engine request for each message. Gives them their `request_id`.

        They are the tenant's whose key the current HTTP request has shown.
        Lets the event loop turn every TURN_S, so that many prompts hold up nobody.

        Raises:
            HttpError: the engine is not ready.
        """
        frontend = self.frontend
        assert self._table is not None
        mixes = dict(self.config.adapter.adapter_mixes)
        is_mix = "adapters" in messages[0] or messages[0].get("adapter") in mixes
        exchange = Exchange(self._table, answer, len(messages), is_mix=is_mix)
        tenant, turn_end = current_tenant.get(), time.monotonic() + TURN_S
        ids = prompt_ids(answer.request_id, len(messages))
        for request_id, message in zip(ids, messages, strict=True):
            if exchange.ended:
                break
            frontend.on_message(exchange.client, {**message, "request_id": request_id}, tenant)
            if time.monotonic() >= turn_end:
                self._check_socket()
                await asyncio.sleep(0)
                turn_end = time.monotonic() + TURN_S
        self._check_socket()
        return exchange

    async def ask(self, kind: str, **values: Any) -> dict[str, Any]:
        """Sends a command of the current HTTP request's tenant and returns the reply.

        Raises:
            HttpError: the command is refused, or the engine is not ready.
        """
        frontend, query = self.frontend, Query()
        assert self._table is not None
        client = self._table.add(query)
        try:
            message = {"type": kind, "request_id": "0", **values}
            frontend.on_message(client, message, current_tenant.get())
            self._check_socket()
            return await query.reply
        finally:
            self._table.forget(client)

    def run_ready(self) -> None:
        """Starts requests whose prompts were tokenized. Call it when the wakeup is set."""
        if self._frontend is not None:
            self._frontend.run_ready()
            self._check_socket()

    def tick(self) -> None:
        """Call it about once a second."""
        if self._frontend is not None:
            self._frontend.tick()
            self._check_socket()

    def fail_all(self, reason: str) -> None:
        """Ends every request. Later ones are refused."""
        self.stop_reason = reason
        if self._frontend is not None:
            self._frontend.fail_all(reason)

    def close(self) -> None:
        if self._frontend is not None:
            self._frontend.close()

    def receive(self) -> None:
        """Takes what the scheduler has sent. Call it when something may have come."""
        self._is_due = False
        try:
            for _, message in self._scheduler.receive():
                if self._frontend is None:
                    self._on_info(message)
                else:
                    self._frontend.on_scheduler(message)
            if self._frontend is not None:
                self._frontend.run_ready()
            self._check_socket()
        except Exception as error:  # the event loop would log it and go on without the messages
            if not self._failed.done():
                self._failed.set_exception(error)

    def _check_socket(self) -> None:
        """Schedules receive() if messages wait: no socket may tell of them again."""
        if not self._is_due and self._has_answers():
            self._is_due = True
            self._loop.call_soon(self.receive)

    def _on_info(self, info: EngineInfo) -> None:
        self.info = info
        self._frontend = Frontend(
            self.config,
            name=seed_salt(self._start),
            info=info,
            codec=self.codec,
            scheduler=self._scheduler,
            clients_of=self._make_table,
            wakeup=self._wakeup,
            counts=FrontendCounts.in_run_dir(self._start.run_dir, self._start.name),
        )
        self._frontend.step_clock = StepClock(self._step_clock)
        self._info_came.set()

    def _make_table(self, requests: Requests) -> ExchangeTable:
        self._table = ExchangeTable(requests)
        return self._table
