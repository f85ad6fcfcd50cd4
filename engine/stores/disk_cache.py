"""A folder of downloaded adapters, bounded in bytes, that processes share.

Its subfolders are named KEY.VERSION.BYTES: the hash of an adapter's address, the hash of its files'
versions in the store, and their size. A download has the suffix .part until it is complete, and its
bytes count from its begin. One lock guards the list of subfolders; a lock in each one guards its
files. The least recently used subfolder that nobody uses is removed when room is needed.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.locked_folder import LOCK_FILE, LockedFolder
from loraplex.engine.stores.store_counts import StoreCounts

PART = ".part"
WAIT_S = 0.05  # between two looks whether another process is done, or room has come


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    key: str
    version: str
    num_bytes: int
    is_part: bool

    @property
    def last_use(self) -> int:
        try:
            return os.stat(self.path / LOCK_FILE).st_mtime_ns
        except OSError:
            return 0


class PartialFolder:
    """A download that is not complete. commit() or discard() ends it."""

    def __init__(self, cache: "DiskCache", folder: LockedFolder) -> None:
        self._cache = cache
        self._folder = folder
        self.path = folder.path

    def commit(self) -> LockedFolder:
        """Makes the folder visible under its name; it is locked, shared with other users."""
        final = self.path.with_name(self.path.name.removesuffix(PART))
        with self._cache.exclusive():
            self.path.rename(final)
            self._folder.touch()
            self._folder.share()
        self._folder.path = final
        return self._folder

    def discard(self) -> None:
        with self._cache.exclusive():
            self._folder.remove()


class DiskCache:
    """Finds, makes and removes subfolders. All methods may be called in any thread."""

    def __init__(self, folder: Path, max_bytes: int, counts: StoreCounts | None = None) -> None:
        """Makes the folder if it is missing; raises OSError if that fails.

        `counts` gets the evictions.
        """
        self._folder = folder
        self._counts = counts or StoreCounts()
        self.max_bytes = max_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, and those that running downloads may still write."""
        with self.exclusive():
            return sum(entry.num_bytes for entry in self._entries())

    def open(self, key: str, version: str = "") -> LockedFolder | None:
        """Locks a complete subfolder for use: that of a version, or the one used last."""
        with self.exclusive():
            found = [
                entry
                for entry in self._entries()
                if entry.key == key and version in ("", entry.version) and not entry.is_part
            ]
            for entry in sorted(found, key=lambda entry: -entry.last_use):
                folder = LockedFolder.lock(entry.path, alone=False)
                if folder is not None:
                    folder.touch()
                    return folder
        return None

    def reserve(
        self, key: str, version: str, num_bytes: int, deadline: Deadline
    ) -> PartialFolder | LockedFolder:
        """Makes a subfolder for a download once there is room.

        Returns:
            The complete subfolder instead, if another process was faster.

        Raises:
            StoreTimeoutError: neither came before the deadline.
        """
        name = f"{key}.{version}.{num_bytes}"
        while True:
            complete = self.open(key, version)
            if complete is not None:
                return complete
            with self.exclusive():
                entries = self._without_stale(self._entries())
                names = {entry.path.name for entry in entries}
                if name in names:  # it became complete since open() looked
                    continue
                if name + PART not in names and self._make_room(entries, num_bytes):
                    path = self._folder / (name + PART)
                    path.mkdir(mode=0o700)
                    folder = LockedFolder.lock(path, alone=True)
                    assert folder is not None, "nobody else looks at new folders meanwhile"
                    return PartialFolder(self, folder)
            deadline.sleep(WAIT_S)

    def remove(self, folder: LockedFolder) -> None:
        """Removes a subfolder that is damaged, unless another process uses it."""
        with self.exclusive():
            folder.release()
            alone = LockedFolder.lock(folder.path, alone=True)
            if alone is not None:
                alone.remove()

    def _make_room(self, entries: list[_Entry], num_bytes: int) -> bool:
        """Removes unused subfolders until there is room; returns False if all are in use."""
        excess = sum(entry.num_bytes for entry in entries) + num_bytes - self.max_bytes
        if excess <= 0:
            return True
        complete = [entry for entry in entries if not entry.is_part]
        for entry in sorted(complete, key=lambda entry: entry.last_use):
            folder = LockedFolder.lock(entry.path, alone=True)
            if folder is not None:
                folder.remove()
                self._counts.count_eviction()
                excess -= entry.num_bytes
                if excess <= 0:
                    return True
        return False

    def _without_stale(self, entries: list[_Entry]) -> list[_Entry]:
        """Removes downloads whose process has ended; returns the other entries."""
        kept = []
        for entry in entries:
            stale = LockedFolder.lock(entry.path, alone=True) if entry.is_part else None
            if stale is not None:
                stale.remove()
            else:
                kept.append(entry)
        return kept

    def _entries(self) -> list[_Entry]:
        found = []
        for path in self._folder.iterdir():
            parts = path.name.removesuffix(PART).split(".")
            if len(parts) == 3 and parts[2].isdigit():
                is_part = path.name.endswith(PART)
                found.append(_Entry(path, parts[0], parts[1], int(parts[2]), is_part))
        return found

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps all other processes and threads from the list of subfolders."""
        fd = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
