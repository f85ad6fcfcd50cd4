"""Adapters read by a process of its own: the same adapters, the same errors, whatever dies."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.reader import (
    ProcessReader,
    ReaderError,
    ThreadReader,
    receive,
    send,
)
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.errors import AdapterError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.messages.reader import NoMemory
from loraplex.engine.model.shard import whole_modules
from loraplex.engine.processes.adapter_reader_main import Slabs, serve
from loraplex.memory.host.slab import plain_slab, shared_slab
from loraplex.memory.host.store import Allocate, HostStore, PackedAdapter

from helpers.models.dummy_models import write_adapter
from helpers.running.adapter_loads import PAGE_SHAPE, SHAPES, TINY

TARGET = AdapterTarget(3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8)


@pytest.fixture(scope="module")
def shared_reader() -> Iterator[ProcessReader]:
    reader = ProcessReader(TARGET)
    yield reader
    reader.close()


@pytest.fixture
def own_reader() -> Iterator[ProcessReader]:
    reader = ProcessReader(TARGET)
    yield reader
    reader.close()


def make_store() -> HostStore:
    return HostStore(1 << 20, make_slab=partial(shared_slab, page_locked=False))


def read(reader: ProcessReader | ThreadReader, store: HostStore, folder: Path) -> PackedAdapter:
    return store.add(lambda allocate: reader.read(folder.name, folder, allocate))


def check_same(got: PackedAdapter, expected: PackedAdapter) -> None:
    assert (got.content_hash, got.num_pages) == (expected.content_hash, expected.num_pages)
    for name in ("data", "rank", "a_start", "b_start", "scale"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape, name
        assert torch.equal(ours, theirs), name


def await_end(pid: int) -> None:
    """Waits until a child has ended; its owner must still reap it."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_the_same_adapters_from_several_threads(
    tmp_path: Path, shared_reader: ProcessReader
) -> None:
    """Read twice each, the second time as known content; slabs come and go meanwhile."""
    folders = [write_adapter(tmp_path / f"a{n}", TINY, rank=1 + n, seed=n) for n in range(8)]
    expected = [read_adapter(folder.name, folder, TARGET) for folder in folders]
    unit = max(adapter.num_bytes for adapter in expected) + 512
    store = HostStore(2 * unit, make_slab=partial(shared_slab, page_locked=False), slab_bytes=unit)
    errors: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for turn in range(16):
                index = (offset + turn) % 8
                folder = folders[index]
                got = store.add(
                    lambda allocate, path=folder: shared_reader.read(path.name, path, allocate),
                    acquire=True,
                )
                check_same(got, expected[index])
                store.release(got.content_hash)
                store.drop(got.content_hash)
                store.check_integrity()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(4 * n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_slabs_that_are_gone_do_not_stay_mapped(
    tmp_path: Path, shared_reader: ProcessReader
) -> None:
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    expected = read_adapter("a", folder, TARGET)
    for _ in range(6):
        slab = shared_slab(expected.num_bytes, page_locked=False)
        check_same(shared_reader.read("a", folder, lambda n, slab=slab: slab[:n]), expected)
    maps = Path(f"/proc/{shared_reader.pid}/maps").read_text()
    assert maps.count("memfd:loraplex-adapters") <= 2


def test_errors_are_those_of_reading_here(tmp_path: Path, shared_reader: ProcessReader) -> None:
    too_large = write_adapter(tmp_path / "large", TINY, rank=9, seed=1)
    damaged = write_adapter(tmp_path / "damaged", TINY, rank=2, seed=1)
    weights = damaged / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 7)
    infinite = write_adapter(tmp_path / "infinite", TINY, rank=2, seed=1)
    weights = infinite / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8:] = b"\x80\x7f" * 4
    weights.write_bytes(data)
    store, here = make_store(), ThreadReader(TARGET)
    for folder in (too_large, damaged, infinite, tmp_path / "none"):
        with pytest.raises(AdapterError) as expected:
            read(here, store, folder)
        with pytest.raises(AdapterError) as got:
            read(shared_reader, store, folder)
        assert str(got.value) == str(expected.value) and folder.name in str(got.value)
        store.check_integrity()
    here.close()
    good = write_adapter(tmp_path / "good", TINY, rank=2, seed=2)
    check_same(read(shared_reader, store, good), read_adapter("good", good, TARGET))


def test_no_memory_is_the_callers_own_error(tmp_path: Path, shared_reader: ProcessReader) -> None:
    """The read fails with what `allocate` raised, and the connection serves the next."""
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)

    def refuse(num_bytes: int) -> torch.Tensor:
        raise MemoryError(f"no {num_bytes} bytes")

    for _ in range(5):  # more than there are connections
        with pytest.raises(MemoryError, match="no [1-9]"):
            shared_reader.read("a", folder, refuse)
        with pytest.raises(ValueError, match="no shared slab"):
            shared_reader.read("a", folder, plain_slab)
    check_same(read(shared_reader, make_store(), folder), read_adapter("a", folder, TARGET))


def test_a_process_that_was_killed_is_replaced(
    tmp_path: Path, own_reader: ProcessReader, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    store = make_store()
    expected = read(own_reader, store, folder)
    store.drop(expected.content_hash)
    pid = own_reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await_end(pid)
    check_same(read(own_reader, store, folder), expected)
    assert own_reader.pid != pid
    assert "was killed by signal 9 (SIGKILL): another is started" in caplog.text


def test_killed_while_it_reads(tmp_path: Path, own_reader: ProcessReader) -> None:
    """That read fails and says why, its memory is free again, the next one works."""
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    store = make_store()
    store.drop(read(own_reader, store, folder).content_hash)

    def die(num_bytes: int) -> torch.Tensor:
        assert own_reader.pid is not None
        os.kill(own_reader.pid, signal.SIGKILL)
        await_end(own_reader.pid)
        return shared_slab(num_bytes, page_locked=False)

    with pytest.raises(ReaderError, match=r"killed by signal 9 \(SIGKILL\)"):
        own_reader.read("a", folder, die)
    assert read(own_reader, store, folder).num_pages
    store.check_integrity()


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    """By close(), and when the connections are gone without it, as after a kill -9."""
    reader = ProcessReader(TARGET)
    pid = reader.pid
    assert pid is not None
    reader.close()
    assert reader.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    reader = ProcessReader(TARGET)
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    read(reader, make_store(), folder)
    pid, process = reader.pid, reader._process
    assert pid is not None and process is not None
    process.connections.pop().close()
    await_end(pid)
    reader.close()


def test_what_no_reader_expects_fails_that_read_alone(
    tmp_path: Path, own_reader: ProcessReader
) -> None:
    """Served over the same connection by a reader with a bug, which is no adapter's fault."""

    class Broken(ThreadReader):
        def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
            if name == "bad":
                raise IndexError("off by one")
            return super().read(name, folder, allocate)

    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    arguments = (theirs, Broken(TARGET), Slabs())
    thread = threading.Thread(target=_serve_to_the_end, args=arguments)
    thread.start()
    assert own_reader._process is not None
    own_reader._process.connections.append(ours)  # the one that is used next
    for _ in range(2):
        with pytest.raises(ReaderError, match="IndexError: off by one"):
            own_reader.read("bad", tmp_path, plain_slab)
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    check_same(read(own_reader, make_store(), folder), read_adapter("a", folder, TARGET))
    ours.close()
    thread.join()
    own_reader._process.connections.remove(ours)


def _serve_to_the_end(link: socket.socket, reader: ThreadReader, slabs: Slabs) -> None:
    with link, pytest.raises((EOFError, ConnectionError)):
        serve(link, reader, slabs)
    reader.close()


def test_a_descriptor_that_did_not_arrive_is_an_error() -> None:
    """The receiver takes one descriptor. A second is lost, as with too many open files."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [codec.encode(NoMemory())], [ours.fileno(), ours.fileno()])
        with pytest.raises(OSError, match="too many open files"):
            receive(theirs)
        send(ours, NoMemory())
        assert receive(theirs) == (NoMemory(), None)
