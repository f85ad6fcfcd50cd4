"""Lists every message between the processes of an engine, for the codec."""

from loraplex.engine.ipc.messages.frontend import (
    AbortRequests,
    AdapterCommand,
    AdapterReply,
    EngineDead,
    EngineInfo,
    FrontendHello,
    ReplyRows,
    ReportLoad,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.ipc.messages.lifecycle import (
    ChildBeat,
    ChildDrained,
    ChildFailed,
    ChildProgress,
    ChildReady,
    ChildStart,
    ChildStatus,
    Drain,
    Shutdown,
    WorkerHangs,
)
from loraplex.engine.ipc.messages.reader import (
    AdapterPacked,
    FolderOpened,
    HostMemory,
    NeedMemory,
    NoMemory,
    OpenFolder,
    ReadAdapter,
    ReaderStart,
    ReadFailed,
)
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.scheduler.frontend_protocol import AddRequest, StepOutputs
from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    Message,
    StepPlan,
    StepResult,
    UnloadAdapter,
    WorkerReady,
)

PROTOCOL_VERSION = 10
"""Changes whenever a message changes: processes of different versions do not understand each
other."""

WIRE_TYPES: tuple[type[Message], ...] = (
    FrontendHello, EngineInfo, AddRequest, AbortRequests, StepOutputs, AdapterCommand, ReplyRows,
    AdapterReply, StatsQuery, StatsReply, ReportLoad, EngineReport, EngineDead,
    ChildStart, ChildProgress, ChildBeat, ChildStatus, ChildReady, ChildFailed, Drain,
    ChildDrained, Shutdown, WorkerHangs, TenantTable,
    StepPlan, StepResult, InspectAdapter, AdapterInspected, LoadAdapter, AdapterLoaded,
    UnloadAdapter, DropAdapter, AdapterEvicted, WorkerReady,
    ReaderStart, ReadAdapter, NeedMemory, HostMemory, NoMemory, AdapterPacked, ReadFailed,
    OpenFolder, FolderOpened,
)  # fmt: skip
