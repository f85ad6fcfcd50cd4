"""Reads adapters in this process, or in a process of its own that packs into shared memory.

Threads that read and pack share the interpreter with the loop that launches steps, and a GPU waits
for that loop. A worker with a GPU therefore uses another process; each read costs it two messages.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from loraplex.engine.adapters.content_hash import ContentHashCache
from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.reader_error import ReaderError
from loraplex.engine.adapters.target import (
    AdapterTarget,
    names_of,
    numbers_of,
    vocabulary_numbers,
)
from loraplex.engine.errors import AdapterError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.child import child_environment, how_it_ended
from loraplex.engine.ipc.messages.reader import (
    AdapterPacked,
    HostMemory,
    NeedMemory,
    NoMemory,
    ReadAdapter,
    ReaderStart,
    ReadFailed,
)
from loraplex.engine.ipc.process_state import process_state
from loraplex.memory.host.slab import live_slabs, place_of
from loraplex.memory.host.store import Allocate, MemoryInUseError, PackedAdapter
from loraplex.memory.vocabulary_part import VocabularyParts
from loraplex.scheduler.worker_protocol import int_array

logger = logging.getLogger("loraplex")

NUM_READERS = 2
"""Largest number of adapters read at a time; several threads pack each of them."""

MAX_PACKERS = 8
"""Largest number of threads that pack and hash layers, for all adapters together."""

MAX_MESSAGE_BYTES = 128 << 10
"""The tables of an adapter for 80 layers take a twelfth of it."""

END_TIMEOUT_S = 5.0

_LOOK_S = 0.5


READ_LIMIT_S = 60.0
"""Longest wait for a read. Where it took longer, its files are mostly in the page cache by then, so
that a repetition gets further."""

STOPPED_S = 3.0
"""How long the process that reads may be stopped by a signal."""


class ReaderStuckError(ReaderError, MemoryInUseError):
    """The process that reads hangs in the kernel and cannot be killed."""


class AdapterReader(Protocol):
    """Reads PEFT directories. NUM_READERS threads may call `read` at a time.

    Attributes:
        needs_shared_memory: `allocate` must return part of a shared slab (memory/host/slab.py).
    """

    needs_shared_memory: bool

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        """Read, check, hash and pack an adapter into memory from `allocate`.

        `allocate` is called at most once.

        Raises:
            AdapterError: the adapter cannot be served; the text names it and the reason.
            ReaderError: the adapter is not the cause.
        """
        ...

    def close(self) -> None: ...


class ThreadReader:
    """Reads in this process and packs with a pool of threads."""

    needs_shared_memory = False

    def __init__(self, target: AdapterTarget) -> None:
        self._target = target
        self._hash_cache = ContentHashCache()
        num_packers = min(MAX_PACKERS, max(1, len(os.sched_getaffinity(0)) // 2))
        self._packers = ThreadPoolExecutor(num_packers, "adapter-packer")

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        return read_adapter(
            name,
            folder,
            self._target,
            allocate=allocate,
            hash_cache=self._hash_cache,
            packers=self._packers,
        )

    def close(self) -> None:
        self._packers.shutdown(wait=True)


class ProcessReader:
    """Reads in a child process (engine/processes/adapter_reader_main.py) that ends with this one.

    If the child dies, the reads in progress fail, and the next read starts another child. A child
    that is stopped by a signal, or that takes longer than `limit_s` for a read, is killed.
    """

    needs_shared_memory = True

    def __init__(self, target: AdapterTarget, limit_s: float = READ_LIMIT_S) -> None:
        self._target = target
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: _Process | None = _Process(target)

    @property
    def pid(self) -> int | None:
        """The id of the child; None if the next read starts one."""
        process = self._process
        return process.popen.pid if process is not None else None

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        with self._connection() as (connection, pid):
            send(connection, ReadAdapter(name, str(folder)))
            deadline = time.monotonic() + self._limit_s
            answer, data = self._receive(connection, pid, deadline), None
            if isinstance(answer, NeedMemory):
                started_at = time.monotonic()
                try:
                    data = _give_memory(connection, answer.num_bytes, allocate)
                except _NoRoomError as error:
                    self._receive(connection, pid, deadline)  # the child's ReadFailed
                    raise error.cause from None
                deadline += time.monotonic() - started_at
                answer = self._receive(connection, pid, deadline)
        if isinstance(answer, ReadFailed):
            raise (AdapterError if answer.is_refused else ReaderError)(answer.text)
        assert data is not None
        return _unpack(answer, data, self._target)

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.end()
            self._process = None

    @contextmanager
    def _connection(self) -> Iterator[tuple[socket.socket, int]]:
        """Lend a connection to a living child, and its id, for one read. Starts one if needed."""
        with self._lock:
            process = self._living_process()
            connection = process.connections.pop()
        try:
            yield connection, process.popen.pid
        except (ConnectionError, EOFError, TimeoutError, codec.WireError) as error:
            connection.close()
            with self._lock:  # the next read takes another child, not a link of this one
                if self._process is process:
                    self._process = None
            how = process.end(at_once=isinstance(error, TimeoutError))
            hung = f"{error}, and " if isinstance(error, TimeoutError) else ""
            kind = ReaderError if process.has_ended else ReaderStuckError
            raise kind(f"the process that reads adapters {hung}{how}") from error
        finally:
            with self._lock:
                if self._process is process:
                    process.connections.append(connection)
                else:
                    connection.close()

    def _living_process(self) -> "_Process":
        """Returns the child, another one if it has died. The caller holds the lock."""
        process = self._process
        if process is not None and process.has_ended:
            self._process = None
            logger.warning("the process that reads adapters %s: another is started", process.end())
        if self._process is None:
            self._process = _Process(self._target)
        return self._process

    def _receive(self, connection: socket.socket, pid: int, deadline: float) -> Any:
        """Returns the next message. Raises TimeoutError for a child that hangs."""
        num_stopped = 0
        connection.settimeout(min(_LOOK_S, self._limit_s))
        while True:
            try:
                return receive(connection)[0]
            except TimeoutError:
                num_stopped = num_stopped + 1 if process_state(pid).is_stopped else 0
                if num_stopped * _LOOK_S >= STOPPED_S:
                    raise TimeoutError(f"was stopped by a signal for {STOPPED_S:g} s") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"took longer than {self._limit_s:g} s") from None


def make_reader(target: AdapterTarget) -> AdapterReader:
    """Returns a ProcessReader for a GPU and a ThreadReader for a CPU."""
    return ProcessReader(target) if target.pin_memory else ThreadReader(target)


class _NoRoomError(Exception):
    """Carries the error of `allocate`."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class _Process:
    """A child, and its connections that no read uses at present."""

    def __init__(self, target: AdapterTarget) -> None:
        pairs = [socket.socketpair(type=socket.SOCK_SEQPACKET) for _ in range(NUM_READERS)]
        self.connections = [ours for ours, _ in pairs]
        theirs = [socket_.fileno() for _, socket_ in pairs]
        module = "loraplex.engine.processes.adapter_reader_main"
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=theirs,
                start_new_session=True,
                env=child_environment(),
            )
        except OSError as error:
            raise ReaderError(f"no process to read adapters can be started: {error}") from None
        finally:
            for _, socket_ in pairs:
                socket_.close()
        start = ReaderStart(
            num_layers=target.num_layers,
            module_names=names_of(target.modules),
            module_numbers=int_array(numbers_of(target.modules)),
            page_elems=target.page_elems,
            dtype=str(target.dtype).removeprefix("torch."),
            weight_dtype=str(target.weight_dtype or target.dtype).removeprefix("torch."),
            max_rank=target.max_rank,
            adapter_roots=list(target.adapter_roots),
            vocabulary_numbers=int_array(vocabulary_numbers(target.vocabulary)),
            base="" if target.vocabulary is None else target.vocabulary.base,
        )
        with contextlib.suppress(ConnectionError):  # it has died already: the first read says so
            send(self.connections[0], start)

    @property
    def has_ended(self) -> bool:
        return self.popen.poll() is not None

    def end(self, at_once: bool = False) -> str:
        """Close the free connections, which ends the child, or kill it. Returns how it ended."""
        for connection in self.connections:
            connection.close()
        for wait_s in (0.0 if at_once else END_TIMEOUT_S, END_TIMEOUT_S):
            try:
                return how_it_ended(self.popen.wait(wait_s))
            except subprocess.TimeoutExpired:
                self.popen.kill()
        return "does not end: the kernel waits for a disk or a network"


def _give_memory(connection: socket.socket, num_bytes: int, allocate: Allocate) -> torch.Tensor:
    """Allocate memory for the child to pack into and send it the place. Returns the memory.

    Raises:
        _NoRoomError: `allocate` failed. The child was told and answers.
    """
    try:
        data = allocate(num_bytes)
        place = place_of(data)
    except BaseException as error:
        send(connection, NoMemory())
        raise _NoRoomError(error) from error
    live = array("q", live_slabs())
    send(connection, HostMemory(place.slab_id, place.slab_bytes, place.offset, live), place.fd)
    return data


def _unpack(packed: AdapterPacked, data: torch.Tensor, target: AdapterTarget) -> PackedAdapter:
    def table(values: "array[Any]", dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(values, dtype=dtype).view(target.num_layers, -1)

    return PackedAdapter(
        content_hash=packed.content_hash,
        num_pages=packed.num_pages,
        data=data.view(target.dtype).view(target.num_layers, -1),
        rank=table(packed.rank, torch.int32),
        a_start=table(packed.a_start, torch.int32),
        b_start=table(packed.b_start, torch.int32),
        gain_start=table(packed.gain_start, torch.int32),
        shift_start=table(packed.shift_start, torch.int32),
        scale=table(packed.scale, torch.float32),
        replaces_bias=packed.replaces_bias,
        vocabulary=VocabularyParts(
            embedding=packed.embedding.part() if packed.embedding else None,
            head=packed.head.part() if packed.head else None,
            num_tokens=packed.num_tokens,
        ),
    )


def send(connection: socket.socket, message: object, fd: int | None = None) -> None:
    """Send a message, and a file descriptor with it if one is given."""
    socket.send_fds(connection, [codec.encode(message)], [] if fd is None else [fd])


def receive(connection: socket.socket) -> tuple[Any, int | None]:
    """Returns the next message, and the file descriptor that came with it.

    Raises:
        EOFError: the other side has closed the connection.
        OSError: this process has too many files open to take another.
    """
    data, fds, flags, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
    if not data:
        raise EOFError
    if flags & socket.MSG_CTRUNC:
        raise OSError("too many open files")
    return codec.decode(data), fds[0] if fds else None
