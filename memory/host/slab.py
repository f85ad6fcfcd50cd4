"""Slabs of host memory for packed adapters.

A slab is private to this process, or it is shared with the process that reads adapters. A shared
slab may be page-locked for a GPU.

While a thread page-locks memory, no other thread can enter the driver, and the thread that launches
steps must wait. Page-locking takes longer if the kernel must first allocate the pages. So the
kernel allocates all pages of a shared slab first, which blocks no other thread, and then the slab
is page-locked piece by piece with pauses between. A CUDA copy must not cross from one piece to the
next: see memory/device/page_copier.py.
"""

import atexit
import itertools
import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from loraplex.memory.free_memory import available_bytes

PIECE_BYTES = 16 << 20
"""A page-locked piece ends where its address is a multiple of this."""

PAUSE_S = 0.002

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class SlabPlace:
    """Place of a tensor in shared memory. `fd` is open as long as a tensor of the slab lives."""

    slab_id: int  # unique in this process for ever
    slab_bytes: int
    fd: int
    offset: int  # bytes


class _Memory:
    """A mapping of shared memory. Every NumPy array over it keeps it alive."""

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
    """Memory that other processes may map by its file descriptor."""

    def __init__(self, num_bytes: int) -> None:
        if num_bytes > (available := available_bytes()):
            raise MemoryError(
                f"{num_bytes} bytes of host memory are needed, and {available} are available"
            )
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
        """Page-lock the slab; raises RuntimeError if the driver refuses."""
        self.locked.device = torch.cuda.current_device()
        content = np.asarray(self)
        content[:: mmap.PAGESIZE] = 0  # maps the pages, or the driver would have to
        for address, num_bytes in pieces(self.address, self.num_bytes):
            status = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
            if int(status):
                raise RuntimeError(f"{num_bytes} bytes cannot be page-locked: {status}")
            self.locked.pieces.append(address)
            time.sleep(PAUSE_S)


_shared: weakref.WeakValueDictionary[int, _Slab] = weakref.WeakValueDictionary()
"""Shared slabs of this process by address."""

_unlockers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_exiting = threading.Event()


def plain_slab(num_bytes: int) -> torch.Tensor:
    """Allocate uint8 [num_bytes] for this process alone."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def shared_slab(num_bytes: int, *, page_locked: bool) -> torch.Tensor:
    """Allocate uint8 [num_bytes] of shared memory, which is freed with the last tensor over it.

    Raises:
        MemoryError, OSError, RuntimeError: the host has too little memory.
    """
    slab = _Slab(num_bytes)
    if page_locked:
        slab.lock_pages()
    return slab.tensor()


def mapped_slab(fd: int, num_bytes: int) -> torch.Tensor:
    """Map another process's slab, uint8 [num_bytes]. `fd` may be closed afterwards."""
    return _Memory(fd, num_bytes).tensor()


def place_of(tensor: torch.Tensor) -> SlabPlace:
    """Return the place of a uint8 tensor in its shared slab.

    Raises:
        ValueError: it lies in no shared slab.
    """
    slab = _shared.get(tensor.untyped_storage().data_ptr())
    if slab is None:
        raise ValueError("the memory lies in no shared slab")
    return SlabPlace(slab.id, slab.num_bytes, slab.fd, int(tensor.storage_offset()))


def live_slabs() -> list[int]:
    """Return the ids of the shared slabs of this process."""
    return [slab.id for slab in list(_shared.values())]


def pieces(address: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of each piece, cut at multiples of PIECE_BYTES."""
    end = address + num_bytes
    while address < end:
        stop = min(end, (address // PIECE_BYTES + 1) * PIECE_BYTES)
        yield address, stop - address
        address = stop


def _free(mapping: mmap.mmap, fd: int, locked: _Locked) -> None:
    """Free a slab; page-locked memory in a thread of its own, as unlocking it takes long and the
    caller may be the thread that launches steps."""
    if locked.pieces:
        thread = threading.Thread(
            target=_unlock, args=(mapping, fd, locked), name="slab-unlocker", daemon=True
        )
        _unlockers.add(thread)
        thread.start()
    else:
        _close(mapping, fd)


def _unlock(mapping: mmap.mmap, fd: int, locked: _Locked) -> None:
    torch.cuda.set_device(locked.device)  # otherwise the driver creates a context on GPU 0
    for address in locked.pieces:
        if _exiting.is_set():
            return  # the kernel frees it all
        torch.cuda.cudart().cudaHostUnregister(address)
        time.sleep(PAUSE_S)
    _close(mapping, fd)


def _await_unlockers() -> None:
    """Wait until no thread is inside the driver: a thread that returns from there to an interpreter
    that has ended aborts the process."""
    _exiting.set()
    for thread in list(_unlockers):
        thread.join()


def _close(mapping: mmap.mmap, fd: int) -> None:
    mapping.close()
    os.ftruncate(fd, 0)  # frees the pages, even where another process maps them
    os.close(fd)


atexit.register(_await_unlockers)
