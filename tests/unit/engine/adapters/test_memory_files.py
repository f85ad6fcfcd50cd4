"""Memory files reach another process whole, cannot be changed, and name nothing else."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engine.adapters.tensors.kept_tensors import KeptTensors
from loraplex.engine.adapters.tensors.memory_file import (
    MAX_VIEWS,
    MemoryFile,
    MemoryPlace,
    UnreachableMemoryError,
    open_memory_file,
)
from loraplex.engine.ipc.messages.frontend import AdapterMemory
from loraplex.scheduler.request import RequestRefused


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = num_descriptors()
    yield
    assert num_descriptors() == before


def read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def test_all_pieces_are_there_in_order() -> None:
    pieces = [bytes([i % 256]) * (i % 7) for i in range(2 * MAX_VIEWS + 3)]
    file = MemoryFile.of(pieces)
    assert file.num_bytes == len(b"".join(pieces))
    assert read(open_memory_file(file.place)) == b"".join(pieces)
    file.close()
    file.close()


def test_nobody_can_change_it() -> None:
    file = MemoryFile.of([b"abc"])
    for change in (
        lambda: os.pwrite(file.fd, b"x", 0),
        lambda: os.ftruncate(file.fd, 1),
        lambda: os.ftruncate(file.fd, 9),
    ):
        with pytest.raises(PermissionError):
            change()
    file.close()


def test_another_process_makes_it_and_dies() -> None:
    script = (
        "import sys; from loraplex.engine.adapters.tensors.memory_file import MemoryFile;"
        "p = MemoryFile.of([b'from afar']).place; print(p.pid, p.fd, p.name, flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        pid, fd, name = child.stdout.readline().split()
        place = MemoryPlace(int(pid), int(fd), name.decode())
        descriptor = open_memory_file(place)
        child.kill()
        child.wait()
    assert read(descriptor) == b"from afar"
    with pytest.raises(UnreachableMemoryError):
        open_memory_file(place)


def test_only_what_the_name_says_is_opened(tmp_path: Path) -> None:
    file = MemoryFile.of([b"abc"])
    with pytest.raises(UnreachableMemoryError, match="not the memory file"):
        open_memory_file(dataclasses.replace(file.place, name="loraplex-0"))
    with (tmp_path / "secret").open("wb") as other, pytest.raises(UnreachableMemoryError):
        open_memory_file(dataclasses.replace(file.place, fd=other.fileno()))
    file.close()
    with pytest.raises(UnreachableMemoryError):
        open_memory_file(dataclasses.replace(file.place, fd=1 << 20))


def test_one_that_is_not_sealed_is_refused() -> None:
    file = MemoryFile()
    with pytest.raises(UnreachableMemoryError, match="no sealed"):
        open_memory_file(file.place)
    file.close()


def test_kept_files_are_counted_and_freed_with_their_source() -> None:
    kept = KeptTensors(max_bytes=10)
    config, tensors = MemoryFile.of([b"{}"]), MemoryFile.of([b"12345"])
    memory = AdapterMemory(os.getpid(), config.fd, tensors.fd)
    source = kept.adopt(memory)
    assert kept.num_bytes == 7
    with pytest.raises(RequestRefused, match="7 bytes.* 7 of 10.*adapter_host_bytes") as refusal:
        kept.adopt(memory)
    assert refusal.value.code == "adapter"
    del source
    assert kept.num_bytes == 0
    again = kept.adopt(memory)
    assert again.is_memory and kept.num_bytes == 7
    config.close(), tensors.close()
    with pytest.raises(RequestRefused, match="send them again"):
        kept.adopt(memory)
    del again
    assert kept.num_bytes == 0
