"""Reading adapters: in this process, or in one of its own that packs them into shared memory.

Threads that read and pack share the interpreter with the loop that launches steps. On a GPU, which
waits for that loop, they are therefore given another: what is left here is two messages a read.
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
from loraplex.memory.host.slab import live_slabs, place_of
from loraplex.memory.host.store import Allocate, PackedAdapter
from loraplex.scheduler.worker_protocol import int_array

logger = logging.getLogger("loraplex")

NUM_READERS = 2
"""Adapters that are read at a time; each is packed by several threads."""

MAX_PACKERS = 8
"""Threads that pack and hash layers, whichever adapter they are of."""

MAX_MESSAGE_BYTES = 128 << 10
"""An adapter's tables for 80 layers take a twelfth of it."""

END_TIMEOUT_S = 5.0


class ReaderError(RuntimeError):
    """Reading failed for a reason that is not the adapter's."""


class AdapterReader(Protocol):
    """Reads PEFT directories; `read` may be called by NUM_READERS threads at a time.

    Attributes:
        needs_shared_memory: what `allocate` gives must lie in a shared slab (memory/host/slab.py).
    """

    needs_shared_memory: bool

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        """Read, check, hash and pack into what `allocate` gives, which is called once at most.

        Raises:
            AdapterError: names the adapter and the reason.
            ReaderError: no fault of the adapter.
        """
        ...

    def close(self) -> None: ...


class ThreadReader:
    """In this process, packing by a pool of threads."""

    needs_shared_memory = False

    def __init__(self, target: AdapterTarget) -> None:
        self._target = target
        self._hashes = ContentHashCache()
        num_packers = min(MAX_PACKERS, max(1, len(os.sched_getaffinity(0)) // 2))
        self._packers = ThreadPoolExecutor(num_packers, "adapter-packer")

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        return read_adapter(
            name,
            folder,
            self._target,
            allocate=allocate,
            hashes=self._hashes,
            packers=self._packers,
        )

    def close(self) -> None:
        self._packers.shutdown(wait=True)


class ProcessReader:
    """In a process of its own (engine/processes/adapter_reader_main.py), which ends with this one.

    Should it die, what it was reading fails, and the next read starts another.
    """

    needs_shared_memory = True

    def __init__(self, target: AdapterTarget) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._process: _Process | None = _Process(target)

    @property
    def pid(self) -> int | None:
        """None: there is none until the next read."""
        process = self._process
        return process.popen.pid if process is not None else None

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        with self._link() as link:
            send(link, ReadAdapter(name, str(folder)))
            answer, data = receive(link)[0], None
            if isinstance(answer, NeedMemory):
                data = _give_memory(link, answer.num_bytes, allocate)
                answer = receive(link)[0]
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
    def _link(self) -> Iterator[socket.socket]:
        """A connection to a living process, for one read."""
        with self._lock:
            if self._process is None or self._process.popen.poll() is not None:
                if self._process is not None:
                    how = self._process.end()
                    logger.warning("the process that reads adapters %s: another is started", how)
                self._process = _Process(self._target)
            process = self._process
            link = process.links.pop()
        try:
            yield link
        except (ConnectionError, EOFError, codec.WireError) as error:
            raise ReaderError(f"the process that reads adapters {process.end()}") from error
        finally:
            process.links.append(link)


def make_reader(target: AdapterTarget) -> AdapterReader:
    """As suits the device: a GPU waits for the loop that launches steps."""
    return ProcessReader(target) if target.pin_memory else ThreadReader(target)


class _Process:
    """A child and its connections that no read uses."""

    def __init__(self, target: AdapterTarget) -> None:
        pairs = [socket.socketpair(type=socket.SOCK_SEQPACKET) for _ in range(NUM_READERS)]
        self.links = [ours for ours, _ in pairs]
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
            in_features=int_array([shape.in_features for shape in target.shapes]),
            out_features=int_array([shape.out_features for shape in target.shapes]),
            page_elems=target.page_elems,
            dtype=str(target.dtype).removeprefix("torch."),
            max_rank=target.max_rank,
        )
        send(self.links[0], start)

    def end(self) -> str:
        """Close the connections that no read uses, upon which it ends; returns how it ended."""
        for link in self.links:
            link.close()
        try:
            status = self.popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            status = self.popen.wait()
        return how_it_ended(status)


def _give_memory(link: socket.socket, num_bytes: int, allocate: Allocate) -> torch.Tensor:
    try:
        data = allocate(num_bytes)
        place = place_of(data)
    except BaseException:
        send(link, NoMemory())
        receive(link)  # its ReadFailed
        raise
    live = array("q", live_slabs())
    send(link, HostMemory(place.slab_id, place.slab_bytes, place.offset, live), place.fd)
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


def send(link: socket.socket, message: object, fd: int | None = None) -> None:
    socket.send_fds(link, [codec.encode(message)], [] if fd is None else [fd])


def receive(link: socket.socket) -> tuple[Any, int | None]:
    """The next message, and the file descriptor that came with it.

    Raises:
        EOFError: the other side is gone.
        OSError: this process has too many files open to take another.
    """
    data, fds, flags, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, 1)
    if not data:
        raise EOFError
    if flags & socket.MSG_CTRUNC:
        raise OSError("too many open files")
    return codec.decode(data), fds[0] if fds else None
