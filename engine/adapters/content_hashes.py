"""Content hashes of files that were read before, so that reading them again need not hash them."""

import threading
import time
from collections import OrderedDict
from pathlib import Path

MAX_KNOWN = 1 << 16
SETTLE_S = 2.0

Stamp = tuple[tuple[int, ...], ...]
"""Of each file what safetensors_file.stamp() returns."""


class ContentHashes:
    """Path -> hash of what was read there, and the stamp its files had. Thread-safe.

    A hash is believed while device, inode, size, mtime and ctime of every file are as they were.
    Nobody but the superuser sets ctime, so a change that keeps all five has to fall into the same
    tick of the file system's clock as the read. That is why the hash of a file changed less than
    SETTLE_S before is not remembered.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[Stamp, str]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, files: Stamp) -> str | None:
        with self._lock:
            known = self._known.get(path)
            if known is None or known[0] != files:
                return None
            self._known.move_to_end(path)
            return known[1]

    def remember(self, path: Path, files: Stamp, content_hash: str) -> None:
        newest = max(max(times[-2:]) for times in files)
        if time.time_ns() - newest < SETTLE_S * 1e9:
            return
        with self._lock:
            self._known[path] = (files, content_hash)
            self._known.move_to_end(path)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
