"""Runs the process that reads a worker's adapters into the worker's memory."""

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from array import array
from pathlib import Path

import torch

from loraplex.engine.adapters.reader import AdapterReader, ThreadReader, receive, send
from loraplex.engine.adapters.reader_error import ReaderError
from loraplex.engine.adapters.target import AdapterTarget, modules_of, vocabulary_of
from loraplex.engine.errors import AdapterError
from loraplex.engine.ipc.log_setup import set_up_logging
from loraplex.engine.ipc.messages.reader import (
    AdapterPacked,
    HostMemory,
    NeedMemory,
    NoMemory,
    PackedPart,
    ReadAdapter,
    ReaderStart,
    ReadFailed,
)
from loraplex.memory.host.slab import mapped_slab
from loraplex.memory.host.store import Allocate, PackedAdapter

_PR_SET_PDEATHSIG = 1

logger = logging.getLogger("loraplex")


class Slabs:
    """Maps the worker's slabs of shared memory when they are first used."""

    def __init__(self) -> None:
        self._mapped: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def take(self, memory: HostMemory, fd: int, num_bytes: int) -> torch.Tensor:
        with self._lock:
            gone = self._mapped.keys() - memory.live_slabs
            for slab_id in gone:  # a thread that still packs into one keeps it mapped
                del self._mapped[slab_id]
            slab = self._mapped.get(memory.slab_id)
            if slab is None:
                slab = self._mapped[memory.slab_id] = mapped_slab(fd, memory.slab_bytes)
            return slab[memory.offset : memory.offset + num_bytes]


def serve(connection: socket.socket, reader: AdapterReader, slabs: Slabs) -> None:
    """Answer the worker's requests until it closes the connection."""

    def allocate(num_bytes: int) -> torch.Tensor:
        send(connection, NeedMemory(num_bytes))
        memory, fd = receive(connection)
        if isinstance(memory, NoMemory):
            raise MemoryError("the worker has no room for the adapter")
        assert fd is not None
        try:
            return slabs.take(memory, fd, num_bytes)
        finally:
            os.close(fd)

    while True:
        request, _ = receive(connection)
        send(connection, _answer(request, reader, allocate))


def _answer(
    request: ReadAdapter, reader: AdapterReader, allocate: Allocate
) -> AdapterPacked | ReadFailed:
    try:
        return _flatten(reader.read(request.name, Path(request.path), allocate))
    except AdapterError as error:
        return ReadFailed(str(error), is_refused=True)
    except (EOFError, ConnectionError):
        raise
    except (MemoryError, ReaderError) as error:
        return ReadFailed(str(error), is_refused=False)
    except Exception as error:
        logger.exception("reading adapter %s failed", request.name)
        return ReadFailed(f"{type(error).__name__}: {error}", is_refused=False)


def _flatten(adapter: PackedAdapter) -> AdapterPacked:
    def flat(table: torch.Tensor) -> bytes:
        return table.contiguous().numpy().tobytes()

    return AdapterPacked(
        content_hash=adapter.content_hash,
        num_pages=adapter.num_pages,
        rank=array("i", flat(adapter.rank)),
        a_start=array("i", flat(adapter.a_start)),
        b_start=array("i", flat(adapter.b_start)),
        gain_start=array("i", flat(adapter.gain_start)),
        shift_start=array("i", flat(adapter.shift_start)),
        scale=array("f", flat(adapter.scale)),
        replaces_bias=adapter.replaces_bias,
        embedding=PackedPart.of(adapter.vocabulary.embedding),
        head=PackedPart.of(adapter.vocabulary.head),
        num_tokens=adapter.vocabulary.num_tokens,
    )


def _target(start: ReaderStart) -> AdapterTarget:
    return AdapterTarget(
        num_layers=start.num_layers,
        modules=modules_of(start.module_names, start.module_numbers),
        page_elems=start.page_elems,
        dtype=getattr(torch, start.dtype),
        weight_dtype=getattr(torch, start.weight_dtype),
        max_rank=start.max_rank,
        adapter_roots=tuple(start.adapter_roots),
        vocabulary=vocabulary_of(start.vocabulary_numbers, start.base),
    )


def end_with_parent_thread() -> None:
    """Have the kernel kill this process when the thread that started it ends.

    The end of the connections says the same, but a process that a signal has stopped reads nothing.
    The threads of a worker that start readers live as long as the worker.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    """Serve each connection, given by its descriptor, in a thread; end when the first one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent_thread()
    set_up_logging("adapter reader")
    torch.set_num_threads(1)  # the packers already use the cores
    connections = [socket.socket(fileno=int(fd)) for fd in sys.argv[1:]]
    ended = threading.Event()

    def run(connection: socket.socket, reader: AdapterReader, slabs: Slabs) -> None:
        try:
            serve(connection, reader, slabs)
        except (EOFError, ConnectionError):
            pass  # the worker has ended; so does this process
        except BaseException:
            logger.exception("failed")
        ended.set()

    try:
        start, _ = receive(connections[0])
    except (EOFError, ConnectionError):
        os._exit(0)
    reader, slabs = ThreadReader(_target(start)), Slabs()
    for connection in connections:
        threading.Thread(target=run, args=(connection, reader, slabs), daemon=True).start()
    ended.wait()
    os._exit(0)  # without waiting for the other threads


if __name__ == "__main__":
    main()
