"""Start, reports, control messages and end of a child process of the engine.

A child reads framed messages from its standard input, ChildStart first. It writes its reports to
the inherited descriptor named on its command line. A frame is a 4-byte little-endian length and the
encoded message. The end of standard input means that the supervisor is gone; the child ends at
once.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from loraplex.engine.errors import LoraplexError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.activity import Activity
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.ipc.log_setup import set_up_logging
from loraplex.engine.ipc.messages.frontend import EngineDead, EngineInfo
from loraplex.engine.ipc.messages.lifecycle import (
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
from loraplex.engine.ipc.messages.tenants import TenantTable

EXIT_FAILED = 1
EXIT_ORPHANED = 3
MAX_FRAME_BYTES = 16 << 20
BEAT_S = 1.0
"""Seconds between two signs of life."""

logger = logging.getLogger("loraplex")


def frame(message: object) -> bytes:
    """Returns the bytes of a frame."""
    data = codec.encode(message)
    return struct.pack("<I", len(data)) + data


def write_frame(stream: BinaryIO, message: object) -> None:
    stream.write(frame(message))
    stream.flush()


def read_frame(stream: BinaryIO) -> Any | None:
    """Returns the next message, or None if the stream ends, even in the middle of a frame."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    (length,) = struct.unpack("<I", header)
    if length > MAX_FRAME_BYTES:
        raise codec.WireError(f"frame of {length} bytes on a control pipe")
    data = stream.read(length)
    return codec.decode(data) if len(data) == length else None


class Child:
    """Connects a child with its supervisor.

    Attributes:
        wakeup: readable when a message may have come.
        tenants: those of the last message.
        activity: what the loop does; the supervisor's watchdog hears of it every BEAT_S seconds.
        stop_reason: why the process must stop, for those who wait for it; "" if there is no reason.
        drain: set when requests shall end before the process is stopped.
    """

    def __init__(self, control: BinaryIO, reports: BinaryIO) -> None:
        start = read_frame(control)
        if not isinstance(start, ChildStart):
            raise SystemExit("this module is started by the engine's supervisor")
        self.start: ChildStart = start
        self.tenants = start.tenants
        self.wakeup = Wakeup()
        self.activity = Activity()
        self.stop_reason = ""
        self.drain: Drain | None = None
        self.stopping = False
        self._control, self._reports = control, reports
        self._report_lock = threading.Lock()
        threading.Thread(target=self._watch, name="control", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def progress(self, text: str) -> None:
        self._report(ChildProgress(text))

    def status(self, text: str) -> None:
        self._report(ChildStatus(text))

    def worker_hangs(self, rank: int, how: str) -> None:
        """Have the supervisor kill a worker that the scheduler has found to hang."""
        self._report(WorkerHangs(rank, how))

    def ready(self, *, endpoint: str = "", info: EngineInfo | None = None) -> None:
        """Report that the child can work. From here on SIGTERM asks its loop to end; before, it
        ends the process."""
        self.wakeup.set_on_signals()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._report(ChildReady(endpoint=endpoint, info=info))

    def drained(self) -> None:
        """Report that no request is left."""
        self._report(ChildDrained())

    def failed(self, code: str, text: str) -> None:
        with contextlib.suppress(OSError):
            self._report(ChildFailed(code, text))

    def _report(self, message: object) -> None:
        with self._report_lock:
            write_frame(self._reports, message)

    def _beat(self) -> None:
        """Send beats. One that would wait, because the supervisor is stopped, is left out."""
        poller = select.poll()
        poller.register(self._reports, select.POLLOUT)
        with contextlib.suppress(OSError):  # the supervisor is gone; _watch() ends the process
            while True:
                if poller.poll(0):
                    self._report(self.activity.beat())
                time.sleep(BEAT_S)

    def _on_sigterm(self, signum: int, frame: object) -> None:
        self.stopping = True

    def _watch(self) -> None:
        while True:
            try:
                message = read_frame(self._control)
            except (OSError, ValueError, codec.WireError):
                message = None
            if message is None:
                shutil.rmtree(self.start.run_dir, ignore_errors=True)
                os._exit(EXIT_ORPHANED)
            if isinstance(message, TenantTable):
                self.tenants = message
            if isinstance(message, Drain):
                self.drain = message
            if isinstance(message, EngineDead | Shutdown):
                self.stop_reason = message.reason
                self.stopping = True
            self.wakeup.set()


def run_child(body: Callable[[Child], None]) -> None:
    """Be the main function of a child: `body` returns on a clean stop and raises otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    reports_fd = int(sys.argv[1])
    os.set_inheritable(reports_fd, False)
    control = os.fdopen(os.dup(0), "rb")
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)  # no library may read control messages from standard input
    os.close(devnull)
    child = Child(control, os.fdopen(reports_fd, "wb"))
    set_up_logging(child.start.name)
    status = 0
    try:
        body(child)
    except LoraplexError as error:
        child.failed(error.code, str(error))
        status = EXIT_FAILED
    except Exception as error:
        logger.exception("failed")
        child.failed("internal", f"{type(error).__name__}: {error}")
        status = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # do not wait for threads inside libraries; everything important is closed


_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""Keeps NVLink multicast off: a program that dies with it on can block it for the whole host."""


def child_environment() -> dict[str, str]:
    """Returns the caller's environment, with a short spin of OpenMP threads, and no multicast.

    Threads that wait for each other then free their cores after some microseconds. By default they
    spin far longer, even if the thread they wait for has no core: on a busy machine a step took two
    to three times as long (benchmarks/results/openmp_cpu.jsonl).
    """
    spin = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "1000"}
    return {**spin, **os.environ, **_NO_MULTICAST}


def how_it_ended(status: int | None) -> str:
    """Returns how a process ended, in words, from the status that subprocess.Popen gives."""
    if status is None or status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-status} ({name})"
