"""Messages between the supervisor and the processes that it starts."""

import msgspec

from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.scheduler.worker_protocol import Message


class ChildStart(Message):
    """First message to a new process. All its sockets are in `run_dir`."""

    name: str  # as in messages to the user: "worker 0", "scheduler", "frontend 0"
    index: int  # its rank, or its number among processes of one kind
    run_dir: str
    config: EngineConfig
    incarnation: int = 0  # how often the supervisor has started it again
    listener_fd: int = -1  # socket bound to the address that it shares with others of its kind
    host: str = ""  # at which a scheduler listens for routers of other machines
    folder_server: str = ""  # socket where copies of adapters are asked for; "": all are here
    tenants: TenantTable = msgspec.field(default_factory=TenantTable)  # until another one comes


class ChildProgress(Message):
    """One line about how far the start has come."""

    text: str


class ChildBeat(Message):
    """A sign of life, sent every second. A worker's steps are counted since its start."""

    num_marks: int  # grows with every turn of the loop, every layer, and every step's end
    is_busy: bool  # False: it waits for messages, and its device has nothing to do
    is_traced: bool  # a Python debugger may stop it
    num_steps: int = 0  # begun
    num_marks_in_step: int = 0  # since the last one began


class ChildStatus(Message):
    """One line about how the engine does, now and then."""

    text: str


class WorkerHangs(Message):
    """The scheduler has found that a worker rank hangs, although its beats may go on."""

    rank: int
    how: str


class ChildReady(Message):
    """The process can work. `endpoint` is where other processes reach it; schedulers add `info`."""

    endpoint: str = ""
    info: EngineInfo | None = None


class ChildFailed(Message):
    """The process is about to exit with an error; `code` as in engine/errors.py."""

    code: str
    text: str


class Drain(Message):
    """Accept requests for `grace_s` more, and report ChildDrained when the last one has ended."""

    grace_s: float


class ChildDrained(Message):
    """The process accepts no requests, has none, and has sent all answers."""


class Shutdown(Message):
    """Finish the message in hand and exit with status 0."""

    reason: str = ""  # for the requests that have not ended
