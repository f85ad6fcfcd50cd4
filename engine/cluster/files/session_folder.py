"""A folder of this machine for the copies of one cluster, which ends with its last user."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "loraplex-adapters-"
LOCK_FILE = ".session"


class SessionFolder:
    """Made by the first engine of a session on this node, and removed by the last one.

    An engine that is killed removes nothing. The next session on the node does it: the kernel gives
    the lock of a dead process back.
    """

    def __init__(self, session: str) -> None:
        """`session` is a random name, which all engines of the cluster know."""
        parent = Path(tempfile.gettempdir())
        for path in parent.glob(f"{PREFIX}*"):
            if path.name != PREFIX + session:
                _remove_if_unused(path)
        self.path = parent / f"{PREFIX}{session}"
        self._fd = self._lock()

    def _lock(self) -> int:
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # its last user removes it meanwhile
                fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _is_same(fd, self.path / LOCK_FILE):
                    return fd
                os.close(fd)

    def close(self) -> None:
        """Gives the folder up; removes it if no other engine uses it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            _remove_if_unused(self.path)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_unused(path: Path) -> None:
    with contextlib.suppress(OSError):  # another user's folder, or it is in use
        fd = os.open(path / LOCK_FILE, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
