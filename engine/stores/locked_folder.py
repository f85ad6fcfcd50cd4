"""A folder that processes lock while they use it."""

import fcntl
import os
import shutil
import time
from pathlib import Path

LOCK_FILE = ".lock"


class LockedFolder:
    """An existing folder whose lock this process holds, shared or alone.

    The kernel gives a lock back when its process ends, however it ends.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def lock(cls, path: Path, *, alone: bool) -> "LockedFolder | None":
        """Locks a folder without waiting; None if it is gone or locked in a way that excludes.

        No folder may be removed meanwhile.
        """
        try:
            fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return cls(path, fd)

    def share(self) -> None:
        """Lets others lock it too, as sharers. Nobody may lock it alone meanwhile."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def touch(self) -> None:
        """Notes that it is used now, finer than the file system's clock ticks."""
        now = time.time_ns()
        os.utime(self._fd, ns=(now, now))

    def remove(self) -> None:
        """Deletes the folder and releases the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        os.close(self._fd)
