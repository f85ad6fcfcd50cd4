"""Serves the clients: checks and tokenizes requests, makes text of tokens, sends outputs, cancels.

The frontend has no sockets. Messages come in as maps or raw frames. Replies leave as maps through
the clients of its entrance: ClientTable for ZeroMQ, ExchangeTable for HTTP.
It runs in the caller's thread; only long prompts are tokenized in other threads (requests.py).
"""

import logging
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from loraplex.engine.adapters.folder_lookup import FolderLookup
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend import protocol
from loraplex.engine.frontend.bounded_msgpack import MAX_ELEMENTS
from loraplex.engine.frontend.clients import ClientsOf
from loraplex.engine.frontend.draining.gate import Gate
from loraplex.engine.frontend.inputs import InputProcessor, TextCodec
from loraplex.engine.frontend.mixing.adapter_lookup import AdapterLookup
from loraplex.engine.frontend.mixing.named_mixes import named_mixes
from loraplex.engine.frontend.mixing.stored_names import StoredNames
from loraplex.engine.frontend.queries import QueryTable
from loraplex.engine.frontend.requests import RequestTable
from loraplex.engine.frontend.scheduler_link import SchedulerLink
from loraplex.engine.frontend.statistics.frontend_counts import FrontendCounts
from loraplex.engine.frontend.statistics.pool_runs import describe_pools
from loraplex.engine.frontend.statistics.worker_rows import worker_rows
from loraplex.engine.frontend.uploads.adapter_uploads import Frames
from loraplex.engine.frontend.uploads.tensor_loads import TensorLoads
from loraplex.engine.frontend.vocabularies.vocabulary_table import VocabularyTable
from loraplex.engine.ipc.channel import Channel, Wakeup
from loraplex.engine.ipc.messages.frontend import (
    AdapterCommand,
    AdapterReply,
    EngineInfo,
    ReplyRows,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.ipc.step_clock import StepClock
from loraplex.engine.stores.open_stores import make_store_lookup
from loraplex.scheduler.frontend_protocol import AdapterSource, StepOutputs

logger = logging.getLogger("loraplex.frontend")


class Frontend:
    """Holds one frontend's clients, their requests and the queries that await an answer.

    Attributes:
        step_clock: for health. The owner sets it to the scheduler's.
        gate: refuses requests once it has closed.
        tensor_loads: loads adapters from tensors. The owner sets what takes them.
        inputs: tokenizes messages; its methods may run in any thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        name: str,
        info: EngineInfo,
        codec: TextCodec | None,
        scheduler: Channel,
        clients_of: ClientsOf,
        wakeup: Wakeup,
        counts: FrontendCounts | None = None,
    ) -> None:
        """Makes a frontend without clients.

        Args:
            name: makes the seeds of this frontend differ from those of others.
            codec: tokenizer and chat template, None if clients send and receive token ids.
            clients_of: makes the table of clients that replies go to.
            wakeup: is set when run_ready() has something to do.
            counts: what it adds to; None: new ones that no other process sees.
        """
        self._config = config
        self._info = info
        self._codec = codec
        self._scheduler = SchedulerLink(scheduler)
        self._mixes = named_mixes(config.adapter)
        self._folders = FolderLookup(config.adapter.adapter_root, wakeup)
        self._queries = QueryTable(self._reply)
        self._counts = counts or FrontendCounts()
        self._stores = make_store_lookup(config.store, wakeup, self._counts.stores)
        stored = (
            StoredNames(self._stores, self._queries, self._scheduler)
            if self._stores is not None
            else None
        )
        self.inputs = InputProcessor(config, info, codec, seed_salt=name)
        self._requests = RequestTable(
            vocabularies=VocabularyTable(config, self.inputs, codec, wakeup),
            adapters=AdapterLookup(self._mixes, self._folders, stored),
            scheduler=self._scheduler,
            reply=self._reply,
            server=config.server,
            wakeup=wakeup,
        )
        self._requests.histograms = self._counts.requests
        self._clients = clients_of(self._requests)
        self.tensor_loads = TensorLoads(self._queries, self._scheduler)
        self._max_elements = max(MAX_ELEMENTS, 2 * info.max_model_len)
        self._num_malformed = 0
        self._dead_reason = ""
        self.step_clock = StepClock()
        self.gate = Gate()
        self._instance = secrets.token_hex(8)  # another one after a restart

    def on_frames(
        self, client: bytes, frames: Sequence[bytes | memoryview], tenant: str | None = ""
    ) -> None:
        """Handles one message of a client, as raw frames. Replies with an error if it is bad.

        `tenant` is whose key the client has shown; empty: the operator's, or keys are not in use;
        None: the key was revoked, so the client may only see its requests end.
        """
        try:
            message = protocol.decode_frame(frames[0] if frames else b"", self._max_elements)
            if len(frames) > 1 and message.get("type") != "load_adapter_tensors":
                text = f"a message must be one frame, got {len(frames)}"
                raise client_error("malformed", text)
        except ClientError as error:
            self._num_malformed += 1
            self._reply(client, protocol.error_reply("", error.code, str(error)))
            return
        self.on_message(client, message, tenant, frames[1:])

    def on_message(
        self,
        client: bytes,
        message: dict[str, Any],
        tenant: str | None = "",
        frames: Frames = (),
    ) -> None:
        """Handles one decoded message of a client, and the frames after it, as on_frames()."""
        try:
            parsed = protocol.parse(message)
            if tenant is None and not isinstance(parsed, protocol.FinalMessage):
                raise client_error("forbidden", "this client's key is not known any more")
            self._dispatch(client, protocol.for_tenant(parsed, tenant or ""), frames)
        except ClientError as error:
            code, text = error.code, str(error)
        except Exception:
            logger.exception("a client's message failed")
            code, text = "internal", "internal error: see the server's log"
        else:
            return
        self._reply(client, protocol.error_reply(protocol.request_id_of(message), code, text))

    def _dispatch(self, client: bytes, message: protocol.ClientMessage, frames: Frames) -> None:
        match message:
            case protocol.Ping():
                self._reply(client, {"type": "pong", "instance": self._instance})
            case protocol.Bye():
                self._clients.forget(client)
            case protocol.CancelRequest():
                self._requests.cancel(client, message.request_id)
            case protocol.HealthRequest():
                self._reply(client, self._health(message.request_id))
            case _ if self._dead_reason:
                text = protocol.error_reply(message.request_id, "engine_dead", self._dead_reason)
                self._reply(client, text)
            case protocol.GenerateRequest():
                self.gate.check()
                self._clients.watch(client)
                self._requests.add(client, message)
            case protocol.StatsRequest():
                asker = (client, message.tenant, message.request_id, "stats")
                query_id = self._queries.add(*asker, rows_key=message.rows_key)
                query = StatsQuery(query_id, by_tier=message.by_tier, pool_cells=message.pool_cells)
                self._ask_scheduler(query_id, query)
            case protocol.ResetPrefixCacheRequest():
                query_id = self._queries.add(client, "", message.request_id, "stats")
                self._ask_scheduler(query_id, StatsQuery(query_id, reset_prefix_cache=True))
            case _:
                self._dispatch_adapter(client, message, frames)

    def _dispatch_adapter(
        self, client: bytes, message: protocol.ClientMessage, frames: Frames
    ) -> None:
        if isinstance(message, protocol.AdapterLoad) and message.name in self._mixes:
            raise ClientError(f"{message.name!r} is a mix: load the adapter under another name")
        match message:
            case protocol.LoadAdapterTensorsRequest():
                self.tensor_loads.add(client, message, frames)
            case protocol.LoadAdapterRequest():
                query_id = self._queries.add(client, message.tenant, message.request_id, "adapters")
                op = "register" if message.lazy else "load"
                self._folders.find(message.path, partial(self._load_adapter, query_id, op, message))
            case protocol.UnloadAdapterRequest():
                self._adapter_command(client, message, "unload")
            case protocol.PinAdapterRequest():
                self._adapter_command(client, message, "pin")
            case protocol.UnpinAdapterRequest():
                self._adapter_command(client, message, "unpin")
            case protocol.ListAdaptersRequest():
                self._adapter_command(client, message, "list")

    def _load_adapter(
        self,
        query_id: int,
        op: str,
        message: protocol.LoadAdapterRequest,
        source: AdapterSource | ClientError,
    ) -> None:
        """Sends a load to the scheduler, now that its folder was looked at."""
        if query_id not in self._queries:
            return  # the engine has died
        try:
            if isinstance(source, ClientError):
                raise client_error(source.code, f"adapter {message.name!r}: {source}")
            command = AdapterCommand(query_id, op, message.name, source, message.tenant)
            self._scheduler.send(command)
        except ClientError as error:
            self._queries.fail(query_id, error.code, str(error))

    def _adapter_command(self, client: bytes, message: protocol.NamedAdapter, op: str) -> None:
        tenant = message.tenant
        query_id = self._queries.add(client, tenant, message.request_id, "adapters")
        self._ask_scheduler(query_id, AdapterCommand(query_id, op, message.name, tenant=tenant))

    def _ask_scheduler(self, query_id: int, message: StatsQuery | AdapterCommand) -> None:
        try:
            self._scheduler.send(message)
        except ClientError:
            self._queries.discard(query_id)
            raise

    def on_scheduler(self, message: object) -> None:
        """Handles one message of the scheduler."""
        match message:
            case StepOutputs():
                self._requests.on_outputs(message)
            case ReplyRows():
                self._queries.add_rows(message.query_id, message.rows)
            case StatsReply():
                stats = {**message.stats, "frontend": self._stats()}
                if message.pools:
                    stats["pools"] = describe_pools(message.pools)
                self._queries.answer(message.query_id, stats)
            case AdapterReply() if message.error:
                code = message.error_code or "adapter"
                self._queries.fail(message.command_id, code, message.error)
                self.tensor_loads.on_answered(message.command_id)
            case AdapterReply():
                self._queries.answer_adapters(message.command_id, message.adapters)
                self.tensor_loads.on_answered(message.command_id)
            case _:
                logger.error("unexpected message %s", type(message).__name__)

    def run_ready(self) -> None:
        """Starts the requests whose prompts other threads have tokenized or whose folders they
        have found, and does a turn's part of long replies."""
        self._requests.start_tokenized()
        self._folders.run_ready()
        if self._stores is not None:
            self._stores.run_ready()
        self.tensor_loads.run_ready()
        self._requests.convert_logprobs()
        self._clients.flush()

    @property
    def flush_due_s(self) -> float | None:
        """Seconds until run_ready() must be called for clients that read slowly, or None."""
        return self._clients.flush_due_s

    @property
    def needs_ticks(self) -> bool:
        """Tells whether clients wait, so that tick() must be called."""
        return len(self._clients) > 0 or self._scheduler.has_unsent

    @property
    def is_idle(self) -> bool:
        """Tells whether no request is unfinished and no client has an answer to read."""
        return not (len(self._clients) or self._requests.num_unfinished)

    def tick(self) -> None:
        """Probes silent clients, and fails requests whose time is over.

        Call it about once a second while `needs_ticks`.
        """
        self._clients.tick()
        self._requests.expire()
        self._scheduler.flush()
        if self._stores is not None:
            self._stores.tick()

    def fail_all(self, reason: str) -> None:
        """Ends every request and query with the error "engine_dead", also later ones."""
        self._dead_reason = reason
        self._requests.fail_all("engine_dead", reason)
        self._queries.fail_all("engine_dead", reason)

    def close(self) -> None:
        self._requests.close()
        self._folders.close()
        if self._stores is not None:
            self._stores.close()
        self.tensor_loads.close()

    def _reply(self, client: bytes, message: dict[str, Any]) -> None:
        self._clients.reply(client, message)

    @property
    def _status(self) -> str:
        if self._dead_reason:
            return "dead"
        return "draining" if self.gate.is_closing else "ok"

    def _health(self, request_id: str) -> dict[str, Any]:
        info, config = self._info, self._config
        return {
            "type": "health",
            "request_id": request_id,
            "status": self._status,
            "reason": self._dead_reason,
            "protocol": protocol.PROTOCOL_VERSION,
            "instance": self._instance,
            "last_step_age_s": self.step_clock.age_s,
            "steps_in_flight": self.step_clock.num_in_flight,
            "unfinished_requests": self._requests.num_unfinished,
            "model": config.model.model,
            "max_model_len": info.max_model_len,
            "vocab_size": info.vocab_size,
            "num_pages": info.num_pages,
            "block_tokens": info.block_tokens,
            "tokenizer": self._codec is not None,
            "chat_template": self._codec is not None and self._codec.chat_template is not None,
            "max_message_bytes": config.server.max_message_bytes,
            "max_requests_per_client": config.server.max_requests_per_client,
            "workers": worker_rows(info),
        }

    def _stats(self) -> dict[str, Any]:
        return {
            **self._requests.counters,
            "malformed": self._num_malformed,
            "lost_clients": self._clients.num_lost,
            "slow_clients": self._clients.num_slow,
            "waiting_clients": len(self._clients),
            "unread_bytes": self._clients.num_unread_bytes,
            "prompt_bytes": self._requests.num_prompt_bytes,
            "ends": self._counts.requests.ends,
            "histograms": self._counts.requests.snapshot(),
        }
