"""Slabs of host memory for packed adapters: of this process alone, or shared with the process that
reads adapters and page-locked for a GPU.

A thread that page-locks memory keeps all others out of the driver, the one that launches steps
too, and longer where the memory is not there yet. So a shared slab is first filled in by the
kernel, which holds up nobody, and then locked a piece at a time with pauses between. CUDA copies
from one piece at a time: see memory/device/page_copier.py.
"""

import itertools
import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

PIECE_BYTES = 16 << 20
"""A piece ends where an address is a multiple of this."""

PAUSE_S = 0.002

_CGROUP = Path("/sys/fs/cgroup")

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class SlabPlace:
    """Where in shared memory a tensor lies. `fd` is open as long as a tensor of the slab lives."""

    slab_id: int  # no other slab of this process ever has the same
    slab_bytes: int
    fd: int
    offset: int  # bytes


class _Memory:
    """A mapping of shared memory; NumPy keeps it alive under every array over it."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.mapping = mmap.mmap(fd, num_bytes)
        self.address = np.frombuffer(self.mapping, dtype=np.uint8).ctypes.data
        self.__array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (num_bytes,), "data": (self.address, False),
        }  # fmt: skip

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self))


@dataclass(slots=True)
class _Locked:
    """Page-locked pieces of a slab, by address."""

    pieces: list[int] = field(default_factory=list)
    device: int = 0


class _Slab(_Memory):
    """Memory that other processes may map by its file descriptor, too."""

    def __init__(self, num_bytes: int) -> None:
        if num_bytes > (available := available_bytes()):
            raise MemoryError(f"{num_bytes} bytes are wanted, and {available} are available")
        self.fd = os.memfd_create("loraplex-adapters", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, num_bytes)
            super().__init__(self.fd, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.id, self.num_bytes = next(_ids), num_bytes
        self.locked = _Locked()
        weakref.finalize(self, _free, self.mapping, self.fd, self.locked).atexit = False
        _shared[self.address] = self

    def lock_pages(self) -> None:
        """Raises RuntimeError: the driver refuses."""
        self.locked.device = torch.cuda.current_device()
        there = np.asarray(self)
        there[:: mmap.PAGESIZE] = 0  # maps the pages, so that the driver need not
        for address, num_bytes in pieces(self.address, self.num_bytes):
            status = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
            if int(status):
                raise RuntimeError(f"{num_bytes} bytes cannot be page-locked: {status}")
            self.locked.pieces.append(address)
            time.sleep(PAUSE_S)


_shared: weakref.WeakValueDictionary[int, _Slab] = weakref.WeakValueDictionary()
"""By address."""


def plain_slab(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes], for this process alone."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def shared_slab(num_bytes: int, *, page_locked: bool) -> torch.Tensor:
    """uint8 [num_bytes]; given back to the system with the last tensor over it.

    Raises:
        MemoryError, OSError, RuntimeError: the host has no such memory.
    """
    slab = _Slab(num_bytes)
    if page_locked:
        slab.lock_pages()
    return slab.tensor()


def mapped_slab(fd: int, num_bytes: int) -> torch.Tensor:
    """Another process's slab, uint8 [num_bytes]. `fd` may be closed."""
    return _Memory(fd, num_bytes).tensor()


def place_of(tensor: torch.Tensor) -> SlabPlace:
    """Of a uint8 tensor that lies in a shared slab.

    Raises:
        ValueError: it does not.
    """
    slab = _shared.get(tensor.untyped_storage().data_ptr())
    if slab is None:
        raise ValueError("the memory lies in no shared slab")
    return SlabPlace(slab.id, slab.num_bytes, slab.fd, int(tensor.storage_offset()))


def live_slabs() -> list[int]:
    """Ids of the shared slabs of this process."""
    return [slab.id for slab in list(_shared.values())]


def available_bytes() -> int:
    """Of host memory that can be had without swapping: asked for more, the kernel would not refuse,
    but kill a process."""
    available = _read_sizes(Path("/proc/meminfo"))["MemAvailable:"] << 10
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cached = _read_sizes(_CGROUP / "memory.stat")["inactive_file"]
    except (OSError, ValueError, KeyError):  # no limit, or none that can be seen
        return available
    return max(0, min(available, limit - used + cached))


def _read_sizes(path: Path) -> dict[str, int]:
    """Of a file of lines that begin with a name and a number."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in lines}


def pieces(address: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """(address, bytes), cut at multiples of PIECE_BYTES."""
    end = address + num_bytes
    while address < end:
        stop = min(end, (address // PIECE_BYTES + 1) * PIECE_BYTES)
        yield address, stop - address
        address = stop


def _free(mapping: mmap.mmap, fd: int, locked: _Locked) -> None:
    """Unlocking takes its time, and the last tensor may have been the launching thread's."""
    if locked.pieces:
        threading.Thread(
            target=_unlock, args=(mapping, fd, locked), name="slab-unlocker", daemon=True
        ).start()
    else:
        _close(mapping, fd)


def _unlock(mapping: mmap.mmap, fd: int, locked: _Locked) -> None:
    torch.cuda.set_device(locked.device)  # or the driver would make itself at home on GPU 0
    for address in locked.pieces:
        torch.cuda.cudart().cudaHostUnregister(address)
        time.sleep(PAUSE_S)
    _close(mapping, fd)


def _close(mapping: mmap.mmap, fd: int) -> None:
    mapping.close()
    os.ftruncate(fd, 0)  # the pages go now, also where another process has them mapped
    os.close(fd)
