"""Messages between the processes; those to the workers are in scheduler/worker_protocol.py.

`engine/ipc/codec.py` turns every class listed in WIRE_TYPES into MessagePack and back.
Request, command and query ids are chosen by the frontend and are unique for its lifetime.
"""

from array import array
from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.scheduler import worker_protocol
from loraplex.scheduler.worker_protocol import SamplingSpec, TokenLogprobs

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class FrontendHello:
    """First message of a frontend; the scheduler answers with EngineInfo."""

    frontend: str


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a frontend must know to validate requests."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    block_tokens: int
    max_queue_len: int
    workers: list[worker_protocol.WorkerReady]


@dataclass(frozen=True, slots=True)
class AddRequest:
    """One sequence (a request with n > 1 is n of these). Empty `adapter` is the base model."""

    request_id: int
    prompt_token_ids: "array[int]"
    sampling: SamplingSpec
    adapter: str = ""
    salt: str = ""  # tenant: nothing is shared between different salts
    priority: int = 0  # lower is earlier
    use_prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class AbortRequests:
    """Unknown and ended ids are ignored; aborted requests get no further output."""

    request_ids: "array[int]"  # array('q')


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of one sequence. `finish_reason`: "", "stop", "length", "abort" or "error"."""

    request_id: int
    token_ids: "array[int]"
    finish_reason: str = ""
    stop_token_id: int = -1  # the stop token that ended it, -1 for none
    error: str = ""
    error_code: str = ""
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from position 1 on


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Everything that one step brought for the requests of one frontend."""

    outputs: list[SequenceOutput]


@dataclass(frozen=True, slots=True)
class AdapterCommand:
    """`op` is "register" (name and path, read on first use), "load" (checked now), "unload",
    "pin", "unpin", "list" (an empty name: all)."""

    command_id: int
    op: str
    name: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True)
class AdapterReply:
    """`adapters` holds the adapter concerned, or those that "list" asked for, as plain maps."""

    command_id: int
    error: str = ""
    error_code: str = ""
    adapters: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StatsQuery:
    query_id: int


@dataclass(frozen=True, slots=True)
class StatsReply:
    query_id: int
    stats: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineDead:
    """The last message of an engine: every request it held fails with `reason`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish the message in hand and exit with status 0."""


@dataclass(frozen=True, slots=True)
class ChildStart:
    """What the supervisor tells a new process first. All its sockets lie in `run_dir`."""

    name: str  # as in messages to the user: "worker 0", "scheduler", "frontend 0"
    index: int  # its rank, or its number among processes of one kind
    run_dir: str
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class ChildProgress:
    """One line about how far the start has come."""

    text: str


@dataclass(frozen=True, slots=True)
class ChildReady:
    """The process can work. The scheduler adds `info`, a frontend its `endpoint`."""

    endpoint: str = ""
    info: EngineInfo | None = None


@dataclass(frozen=True, slots=True)
class ChildFailed:
    """The process is about to exit with an error; `code` as in engine/errors.py."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class ReaderStart:
    """What a worker tells the process that reads its adapters first: its AdapterTarget."""

    num_layers: int
    in_features: "array[int]"  # of each module
    out_features: "array[int]"
    page_elems: int
    dtype: str
    max_rank: int


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """Answered by an AdapterPacked or a ReadFailed, after a NeedMemory if there is something to
    pack."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class NeedMemory:
    """Answered by a HostMemory, with the slab's file descriptor, or by NoMemory."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Where to pack; `live_slabs`, of which this is one, are those that need stay mapped."""

    slab_id: int
    slab_bytes: int
    offset: int
    live_slabs: "array[int]"


@dataclass(frozen=True, slots=True)
class NoMemory:
    """The worker has no room for the adapter, and says why itself."""


@dataclass(frozen=True, slots=True)
class AdapterPacked:
    """The fields of a PackedAdapter, tables flattened; its data lies where HostMemory said."""

    content_hash: str
    num_pages: int
    rank: "array[int]"
    a_start: "array[int]"
    b_start: "array[int]"
    scale: "array[float]"


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """`is_refused`: the adapter is at fault, and `text` is for its user."""

    text: str
    is_refused: bool


FrontendMessage = FrontendHello | AddRequest | AbortRequests | AdapterCommand | StatsQuery
SchedulerMessage = EngineInfo | StepOutputs | AdapterReply | StatsReply | EngineDead

# The position in this tuple is the type's tag on the wire: append, never reorder.
WIRE_TYPES: tuple[type, ...] = (
    FrontendHello,
    EngineInfo,
    AddRequest,
    AbortRequests,
    StepOutputs,
    AdapterCommand,
    AdapterReply,
    StatsQuery,
    StatsReply,
    EngineDead,
    Shutdown,
    worker_protocol.StepPlan,
    worker_protocol.StepResult,
    worker_protocol.InspectAdapter,
    worker_protocol.AdapterInspected,
    worker_protocol.LoadAdapter,
    worker_protocol.AdapterLoaded,
    worker_protocol.UnloadAdapter,
    worker_protocol.WorkerReady,
    ChildStart,
    ChildProgress,
    ChildReady,
    ChildFailed,
    worker_protocol.DropAdapter,
    worker_protocol.AdapterEvicted,
    ReaderStart,
    ReadAdapter,
    NeedMemory,
    HostMemory,
    NoMemory,
    AdapterPacked,
    ReadFailed,
)
