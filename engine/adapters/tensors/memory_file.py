"""Files in memory that one process makes and others on the machine open.

Such a file (memfd) has no name in any file system. It is gone when no process has it open, also
after a kill -9. Its content is sealed: nobody can change it or its size.
"""

import fcntl
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass

MAX_VIEWS = 1024  # of one writev
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """Where another process finds a memory file.

    Attributes:
        pid: a process that has it open.
        fd: the descriptor in that process.
        name: the file's name, which cannot be guessed: only who was told may have it opened.
    """

    pid: int
    fd: int
    name: str


class UnreachableMemoryError(ValueError):
    """The place names no memory file that this process can open."""


class MemoryFile:
    """An open memory file. Close it once the reader has opened it."""

    def __init__(self) -> None:
        self.name = f"loraplex-{secrets.token_hex(16)}"
        self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    @classmethod
    def of(cls, pieces: Iterable["bytes | memoryview"]) -> "MemoryFile":
        """Returns a sealed file of these pieces, one after another.

        Raises:
            OSError: there is no memory or no descriptor left.
        """
        file = cls()
        try:
            file._write([memoryview(piece).cast("B") for piece in pieces if len(piece)])
            file.seal()
        except BaseException:
            file.close()
            raise
        return file

    @property
    def place(self) -> MemoryPlace:
        return MemoryPlace(os.getpid(), self.fd, self.name)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.fd).st_size

    def seal(self) -> None:
        """Forbids every change. Writable mappings must be closed before."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Closes it. Calling again does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _write(self, views: list[memoryview]) -> None:
        first = 0
        while first < len(views):
            count = os.writev(self.fd, views[first : first + MAX_VIEWS])
            while first < len(views) and count >= len(views[first]):
                count -= len(views[first])
                first += 1
            if count:
                views[first] = views[first][count:]


def open_memory_file(place: MemoryPlace) -> int:
    """Returns a descriptor of a sealed memory file of another process.

    Raises:
        UnreachableMemoryError: the process or file is gone, belongs to another user or container,
            has another name, or is not sealed.
    """
    path = f"/proc/{place.pid}/fd/{place.fd}"
    expected = f"/memfd:{place.name} (deleted)"
    try:
        if os.readlink(path) != expected:  # before it is opened: it may be a device
            raise UnreachableMemoryError(f"{path} is not the memory file that the client names")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise UnreachableMemoryError(f"the client's memory cannot be opened: {error}") from None
    try:
        _check(descriptor, expected)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(descriptor: int, expected: str) -> None:
    try:
        is_named = os.readlink(f"/proc/self/fd/{descriptor}") == expected
        is_sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # it is no memory file
        is_named = is_sealed = False
    if not (is_named and is_sealed and stat.S_ISREG(os.fstat(descriptor).st_mode)):
        raise UnreachableMemoryError("the client's memory is no sealed memory file")
