"""Messages between the frontends and the scheduler.

AddRequest and StepOutputs, which the scheduler itself reads and makes, are in
``scheduler/frontend_protocol.py``. A frontend chooses request, command and query ids; each is
unique for its lifetime.
"""

from typing import Any

from loraplex.engine.ipc.messages.pool_map import PoolMap
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.worker_protocol import Int64Array, Message, Record, WorkerReady


class FrontendHello(Message):
    """First message of a frontend; the scheduler answers with EngineInfo."""

    frontend: str


class EngineInfo(Message):
    """Sizes and limits that a frontend needs to check requests."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    block_tokens: int
    max_queue_len: int
    workers: list[WorkerReady]


class ReportLoad(Message):
    """Asks the scheduler for EngineReports from now on; the first one comes at once."""


class AbortRequests(Message):
    """Unknown and ended ids are ignored; aborted requests get no further output."""

    request_ids: Int64Array


class AdapterMemory(Record):
    """Memory files of an adapter, which the sender has open until the command is answered."""

    pid: int
    config_fd: int  # adapter_config.json
    tensors_fd: int  # adapter_model.safetensors


class AdapterCommand(Message):
    """Changes or lists adapters; answered by an AdapterReply.

    `op` is "register" (name and source, read on first use), "load" (checked now), "unload", "pin",
    "unpin" or "list" (an empty name: all).
    """

    command_id: int
    op: str
    name: str = ""
    source: AdapterSource | None = None  # for "register" and "load"
    tenant: str = ""  # who asks; empty: the operator
    memory: AdapterMemory | None = None  # for "load", instead of a source


class StatsQuery(Message):
    """Answered by a StatsReply."""

    query_id: int
    reset_prefix_cache: bool = False  # empty the prefix cache first
    by_tier: bool = False  # the rows before it are those of adapters_by_tier()
    pool_cells: int = 0  # most cells of a map of the pool; 0: none


class ReplyRows(Message):
    """A part of the rows of a reply that is too long for one turn of the scheduler.

    Any number of these precede the AdapterReply or StatsReply with the same id. Rows of different
    parts are from different moments.
    """

    query_id: int
    rows: list[dict[str, Any]]


class AdapterReply(Message):
    """`adapters` holds the adapter concerned; a list's rows come before, as ReplyRows."""

    command_id: int
    error: str = ""
    error_code: str = ""
    adapters: list[dict[str, Any]] = []


class StatsReply(Message):
    """Load, memory and counters; the adapters in pages come before, as ReplyRows."""

    query_id: int
    stats: dict[str, Any]
    pools: list[PoolMap] = []  # one of each engine, if they were asked for


class EngineDead(Message):
    """The last message of an engine: every request it held fails with `reason`."""

    reason: str
