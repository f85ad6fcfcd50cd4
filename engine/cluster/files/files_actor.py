"""Hands the files of the router's node to other nodes, through Ray's object store."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from loraplex.engine.cluster.files.adapter_files import AdapterFiles, FolderFile

HELD_PIECES = 4  # of PIECE_BYTES; nodes that copy one adapter at a time read them once


class FilesActor:
    """Runs on the router's node. Ray calls its methods in several threads.

    A piece is put into the object store once, and Ray brings it to each node that asks, from the
    nearest one that has it. The last pieces are held for that.
    """

    def __init__(self, adapter_roots: Sequence[str]) -> None:
        """`adapter_roots` are those of this node; see AdapterFiles."""
        self._files = AdapterFiles(adapter_roots)
        self._held: OrderedDict[tuple[str, FolderFile, int], Any] = OrderedDict()
        self._lock = threading.Lock()  # a piece is read once

    def list_files(self, path: str) -> list[FolderFile]:
        """Lists as AdapterFiles does."""
        return self._files.list_files(path)

    def put(self, path: str, file: FolderFile, start: int) -> list[Any]:
        """Returns a list of one reference to a piece: Ray would fetch a bare reference at once."""
        import ray

        key = (path, file, start)
        with self._lock:
            if key not in self._held:
                self._held[key] = ray.put(self._files.read(path, file, start))
                if len(self._held) > HELD_PIECES:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return [self._held[key]]
