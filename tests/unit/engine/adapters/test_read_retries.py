"""Reads that fail for a passing reason are repeated; those of a bad adapter are not."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from loraplex.engine.adapters.loader import AdapterLoader
from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.read_queue import RETRY_DELAYS_S, ReadQueue
from loraplex.engine.adapters.reader import ProcessReader, ThreadReader
from loraplex.engine.adapters.reader_error import ReaderError, is_transient
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.errors import AdapterError
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.device.page_copier import HostPageCopier
from loraplex.memory.device.pool import PagePool
from loraplex.memory.host.slab import shared_slab
from loraplex.memory.host.store import Allocate, HostStore, PackedAdapter
from loraplex.scheduler.worker_protocol import InspectAdapter, LoadAdapter, int_array

from helpers.models.dummy_models import write_adapter
from helpers.running.adapter_loads import PAGE_SHAPE, SHAPES, TINY
from helpers.running.processes import GUARD_S, is_alive, wait_until

CPU = torch.device("cpu")
TARGET = AdapterTarget(3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8)


class FailingReader(ThreadReader):
    """Fails its first reads with the given errors."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__(TARGET)
        self.errors = list(errors)
        self.num_reads = 0

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        self.num_reads += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().read(name, folder, allocate)


class Answers:
    """A loader whose answers the test takes one by one."""

    def __init__(self, reader: ThreadReader | ProcessReader) -> None:
        self._items: list[object] = []
        self._arrived = threading.Semaphore(0)
        pool = PagePool(PAGE_SHAPE, 20, CPU)
        self.copier = HostPageCopier(pool)
        self.loader = AdapterLoader(
            reader=reader,
            table=AdapterTable(TARGET, 4, CPU),
            copier=self.copier,
            host_bytes=1 << 20,
            report=self._report,
        )

    def _report(self, item: object) -> None:
        self._items.append(item)
        self._arrived.release()

    def next(self) -> object:
        assert self._arrived.acquire(timeout=GUARD_S)
        return self._items.pop(0)

    def inspect(self, folder: Path) -> object:
        self.loader.inspect(InspectAdapter(folder.name, str(folder)))
        return self.next()


@pytest.fixture
def answers() -> Iterator[Callable[[ThreadReader | ProcessReader], Answers]]:
    made: list[Answers] = []

    def make(reader: ThreadReader | ProcessReader) -> Answers:
        made.append(Answers(reader))
        return made[-1]

    yield make
    for one in made:
        one.loader.close()


def test_passing_failures_are_repeated_until_it_works(tmp_path: Path, answers) -> None:
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    reader = FailingReader(ReaderError("killed"), MemoryError("none"), OSError(24, "too many"))
    made = answers(reader)
    answer = made.inspect(folder)
    assert answer.content_hash == read_adapter("a", folder, TARGET).content_hash
    assert (answer.error, reader.num_reads) == ("", 4)
    made.loader.store.check_integrity()


def test_lasting_failures_are_not(tmp_path: Path, answers) -> None:
    reader = FailingReader(AdapterError("adapter 'a': it is damaged"))
    answer = answers(reader).inspect(tmp_path)
    assert (answer.error, answer.is_transient) == ("adapter 'a': it is damaged", False)
    assert reader.num_reads == 1


def test_a_load_that_fails_too_often_is_transient_and_the_next_one_works(
    tmp_path: Path, answers
) -> None:
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    reader = FailingReader()
    made = answers(reader)
    described = made.inspect(folder)
    made.loader.drop(described.content_hash)
    assert made.next().content_hash == described.content_hash
    reader.errors = [ReaderError("the disk hangs")] * (1 + len(RETRY_DELAYS_S))
    pages = int_array(range(3, 3 + described.num_pages))
    command = LoadAdapter(2, described.content_hash, str(folder), pages)
    for is_bad in (True, False):
        made.loader.load(command, made.copier.record_event())
        loaded = made.loader.finish(made.next())
        assert loaded.is_transient is is_bad
        assert ("the disk hangs" in loaded.error) is is_bad
    assert not reader.errors and made.loader.store.num_in_use == 0
    made.loader.store.check_integrity()


def test_errors_of_the_system_are_told_from_those_of_the_files() -> None:
    for number in (errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        assert is_transient(OSError(number, ""))
    for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENOTDIR):
        assert not is_transient(OSError(number, ""))


# With the real process.


@pytest.fixture
def reader() -> Iterator[ProcessReader]:
    reader = ProcessReader(TARGET, limit_s=GUARD_S)
    yield reader
    reader.close()


def make_store() -> HostStore:
    return HostStore(1 << 20, make_slab=partial(shared_slab, page_locked=False))


def pid_of(reader: ProcessReader) -> int:
    assert reader.pid is not None
    return reader.pid


def test_a_loader_reads_on_when_its_process_is_killed(
    tmp_path: Path, answers, reader: ProcessReader
) -> None:
    made = answers(reader)
    assert made.inspect(write_adapter(tmp_path / "a", TINY, rank=2, seed=1)).error == ""
    os.kill(pid_of(reader), signal.SIGSTOP)  # so that it dies with the read under way
    folder = write_adapter(tmp_path / "b", TINY, rank=2, seed=2)
    made.loader.inspect(InspectAdapter("b", str(folder)))
    os.kill(pid_of(reader), signal.SIGKILL)
    answer = made.next()
    assert answer.content_hash == read_adapter("b", folder, TARGET).content_hash


def test_a_process_without_file_descriptors_is_a_passing_failure(
    tmp_path: Path, reader: ProcessReader
) -> None:
    folder, store = write_adapter(tmp_path / "a", TINY, rank=2, seed=1), make_store()
    store.drop(store.add(lambda allocate: reader.read("a", folder, allocate)).content_hash)
    pid = pid_of(reader)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    with pytest.raises(ReaderError, match="Too many open files"):
        store.add(lambda allocate: reader.read("a", folder, allocate))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert store.add(lambda allocate: reader.read("a", folder, allocate)).num_pages
    assert reader.pid == pid


@pytest.mark.parametrize(
    ("limit_s", "text"), [(GUARD_S, "was stopped by a signal for 3 s"), (0.5, "longer than 0.5 s")]
)
def test_a_process_that_hangs_is_replaced(tmp_path: Path, limit_s: float, text: str) -> None:
    """Both reads under way fail at about one time. Neither finds a closed link afterwards."""
    folders = [write_adapter(tmp_path / f"a{n}", TINY, rank=2, seed=n) for n in range(2)]
    reader, store = ProcessReader(TARGET, limit_s=GUARD_S), make_store()
    for folder in folders:
        store.drop(store.add(partial(reader.read, folder.name, folder)).content_hash)
    reader.close()
    reader = ProcessReader(TARGET, limit_s=limit_s)
    pid, errors = pid_of(reader), []
    os.kill(pid, signal.SIGSTOP)

    def read(folder: Path) -> None:
        try:
            store.add(partial(reader.read, folder.name, folder))
        except ReaderError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert len(errors) == 2 and any(text in error for error in errors), errors
    wait_until(lambda: not is_alive(pid))
    if limit_s < 1:  # too short for a new process, which must start
        reader.close()
        reader = ProcessReader(TARGET, limit_s=GUARD_S)
    for folder in folders:
        assert store.add(partial(reader.read, folder.name, folder)).num_pages
    reader.close()
    store.check_integrity()


def test_a_sibling_of_a_broken_link_reads_through_another_process(
    tmp_path: Path, reader: ProcessReader
) -> None:
    """It has died, and the read that was under way has not noticed yet."""
    folder, store = write_adapter(tmp_path / "a", TINY, rank=2, seed=1), make_store()
    is_ending, may_end = threading.Event(), threading.Event()

    def die(num_bytes: int) -> torch.Tensor:
        pid = pid_of(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        is_ending.set()
        assert may_end.wait(GUARD_S)
        return shared_slab(num_bytes, page_locked=False)

    def read() -> None:
        with pytest.raises(ReaderError):
            reader.read("a", folder, die)

    thread = threading.Thread(target=read)
    thread.start()
    assert is_ending.wait(GUARD_S)
    first = store.add(partial(reader.read, "a", folder))  # a living process, an open link
    may_end.set()
    thread.join(GUARD_S)
    assert not thread.is_alive()
    store.drop(first.content_hash)
    assert store.add(partial(reader.read, "a", folder)).num_pages


OWNER = """
import os, sys, torch
from pathlib import Path
from loraplex.engine.adapters.reader import ProcessReader
from loraplex.memory.host.slab import shared_slab
from helpers.running.adapter_loads import PAGE_SHAPE, SHAPES
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
target = AdapterTarget(3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8)
reader = ProcessReader(target)
reader.read("a", Path(sys.argv[1]), lambda n: shared_slab(n, page_locked=False)[:n])
print(reader.pid, flush=True)
sys.stdin.read()
"""


def test_a_stopped_process_ends_with_its_owner(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", TINY, rank=2, seed=1)
    tests = str(Path(__file__).parents[3])
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), tests) if p)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    try:
        os.kill(pid, signal.SIGSTOP)
        owner.kill()
        owner.communicate()
        wait_until(lambda: not is_alive(pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_read_that_fails_as_the_queue_closes_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reads = ReadQueue(1, lambda: None)
    began, failures = threading.Event(), []

    def fail(error: Exception, is_transient: bool) -> None:
        failures.append(error)

    def read() -> None:
        began.set()
        while True:  # until the queue is closed, which this submit says by a RuntimeError
            reads.submit(lambda: None, fail)
            time.sleep(0.01)

    reads.submit(read, fail)
    assert began.wait(GUARD_S)
    reads.close()
    assert not failures and not caplog.records
