"""Reads adapters in this process, or in a process of its own that packs into shared memory.

Threads that read and pack share the interpreter with the loop that launches steps, and a GPU waits
for that loop. A worker with a GPU therefore uses another process; each read costs it two messages.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from loraplex.engine.adapters.content_hash import ContentHashCache
from loraplex.engine.adapters.packing import AdapterTarget
from loraplex.engine.adapters.peft_files import read_adapter
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
from loraplex.engine.model.shard import Piece
from loraplex.memory.host.slab import live_slabs, place_of
from loraplex.memory.host.store import Allocate, PackedAdapter
from loraplex.scheduler.worker_protocol import int_array

logger = logging.getLogger("loraplex")

NUM_READERS = 2
"""Largest number of adapters read at a time; several threads pack each of them."""

MAX_PACKERS = 8
"""Largest number of threads that pack and hash layers, for all adapters together."""

MAX_MESSAGE_BYTES = 128 << 10
"""The tables of an adapter for 80 layers take a twelfth of it."""

END_TIMEOUT_S = 5.0


class ReaderError(RuntimeError):
    """Reading failed, and the adapter is not the cause."""


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

    If the child dies, the reads in progress fail, and the next read starts another child.
    """

    needs_shared_memory = True

    def __init__(self, target: AdapterTarget) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._process: _Process | None = _Process(target)

    @property
    def pid(self) -> int | None:
        """The id of the child; None if the next read starts one."""
        process = self._process
        return process.popen.pid if process is not None else None

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        with self._connection() as connection:
            send(connection, ReadAdapter(name, str(folder)))
            answer, data = receive(connection)[0], None
            if isinstance(answer, NeedMemory):
                data = _give_memory(connection, answer.num_bytes, allocate)
                answer = receive(connection)[0]
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
    def _connection(self) -> Iterator[socket.socket]:
        """Lend a connection to a living child for one read, starting a child if there is none."""
        with self._lock:
            if self._process is None or self._process.popen.poll() is not None:
                if self._process is not None:
                    how = self._process.end()
                    logger.warning("the process that reads adapters %s: another is started", how)
                self._process = _Process(self._target)
            process = self._process
            connection = process.connections.pop()
        try:
            yield connection
        except (ConnectionError, EOFError, codec.WireError) as error:
            raise ReaderError(f"the process that reads adapters {process.end()}") from error
        finally:
            process.connections.append(connection)


def make_reader(target: AdapterTarget) -> AdapterReader:
    """Returns a ProcessReader for a GPU and a ThreadReader for a CPU."""
    return ProcessReader(target) if target.pin_memory else ThreadReader(target)


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
            sides=int_array([value for side in target.sides for p in side for value in _flat(p)]),
            page_elems=target.page_elems,
            dtype=str(target.dtype).removeprefix("torch."),
            max_rank=target.max_rank,
            adapter_root=target.adapter_root,
        )
        send(self.connections[0], start)

    def end(self) -> str:
        """Close the connections, which ends the child. Returns how it ended."""
        for connection in self.connections:
            connection.close()
        try:
            status = self.popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            status = self.popen.wait()
        return how_it_ended(status)


def _flat(piece: Piece) -> tuple[int, int, int, int]:
    return piece.start, piece.stop, piece.size, piece.total


def sides_of(start: ReaderStart) -> tuple[tuple[Piece, Piece], ...]:
    """Returns AdapterTarget.sides from the message."""
    values = list(start.sides)
    pieces = [Piece(*values[i : i + 4]) for i in range(0, len(values), 4)]
    return tuple(zip(pieces[::2], pieces[1::2], strict=True))


def _give_memory(connection: socket.socket, num_bytes: int, allocate: Allocate) -> torch.Tensor:
    """Allocate memory for the child to pack into and send it the place. Returns the memory."""
    try:
        data = allocate(num_bytes)
        place = place_of(data)
    except BaseException:
        send(connection, NoMemory())
        receive(connection)  # the child answers with a ReadFailed
        raise
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
        scale=table(packed.scale, torch.float32),
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
