"""Copies adapters to this node, once for all of its engines."""

import hashlib
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from loraplex.engine.cluster.files.adapter_files import (
    AdapterFiles,
    FilePiece,
    FilesChangedError,
    FolderFile,
    hash_of,
)
from loraplex.engine.errors import AdapterError
from loraplex.engine.stores.checksums import is_intact, write_checksums
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.disk_cache import DiskCache
from loraplex.engine.stores.locked_folder import LockedFolder

FETCH_LIMIT_S = 90.0

logger = logging.getLogger("loraplex.cluster")


class FileSource(Protocol):
    """Reads the files of another node. AdapterFiles reads those of this one.

    Both methods raise OSError as AdapterFiles does, and where the other node does not answer.
    """

    def list_files(self, path: str) -> list[FolderFile]: ...

    def read(self, path: str, file: FolderFile, start: int) -> FilePiece: ...


class NodeFiles:
    """Finds or makes this node's copy of a folder. Usable from any thread.

    A folder of this node with the same sizes and times as the original needs no copy: the nodes
    share a file system. Copies are in a cache that is bounded in bytes and shared by processes.
    """

    def __init__(
        self, source: FileSource, cache: DiskCache, adapter_roots: Sequence[str] = ()
    ) -> None:
        """`adapter_roots` are those of this node; see AdapterFiles."""
        self._source = source
        self._cache = cache
        self._own = AdapterFiles(adapter_roots)
        self._verified: set[str] = set()  # copies whose bytes this process has compared
        self._closed = threading.Event()

    def open(self, path: str) -> LockedFolder | None:
        """Returns a copy, which stays until it is released; None: use the path itself.

        Raises:
            AdapterError: the original is not there, or the copy would be larger than the cache.
            OSError: the original has changed meanwhile, its node does not answer, or this node has
                no room. Another try may work.
        """
        files = self._list(path)
        if self._is_here(path, files):
            return None
        num_bytes = sum(file.num_bytes for file in files)
        if num_bytes > self._cache.max_bytes:
            raise AdapterError(
                f"{path} is not on this node and has {num_bytes:,} bytes, more than the "
                f"{self._cache.max_bytes:,} of adapter_cache_bytes"
            )
        deadline = Deadline(FETCH_LIMIT_S, self._closed, name="an adapter's copy")
        key, version = _short_hash(path), _short_hash(repr(files))
        folder = self._open_copy(key, version)
        if folder is not None:
            return folder
        place = self._cache.reserve(key, version, num_bytes, deadline)
        if isinstance(place, LockedFolder):
            return place
        try:
            self._copy(path, files, place.path, deadline)
        except BaseException:
            place.discard()
            raise
        logger.info("copied %s from the router's node, %d bytes", path, num_bytes)
        copy = place.commit()
        self._verified.add(copy.path.name)
        return copy

    def close(self) -> None:
        """Ends the copies that are being made."""
        self._closed.set()

    def _list(self, path: str) -> list[FolderFile]:
        try:
            return self._source.list_files(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise AdapterError(
                f"{path} cannot be read on the router's node: {error.strerror or error}"
            ) from None

    def _is_here(self, path: str, files: Sequence[FolderFile]) -> bool:
        try:
            return self._own.list_files(path) == files
        except (OSError, ValueError):
            return False

    def _open_copy(self, key: str, version: str) -> LockedFolder | None:
        folder = self._cache.open(key, version)
        if folder is None or folder.path.name in self._verified:
            return folder
        if is_intact(folder.path):
            self._verified.add(folder.path.name)
            return folder
        logger.warning("the copy in %s is damaged, and is made again", folder.path)
        self._cache.remove(folder)
        return None

    def _copy(
        self, path: str, files: Sequence[FolderFile], folder: Path, deadline: Deadline
    ) -> None:
        digests = {}
        for file in files:
            digest, start = hashlib.blake2b(digest_size=16), 0
            with (folder / file.name).open("wb") as output:
                while start < file.num_bytes:
                    deadline.check()
                    piece = self._source.read(path, file, start)
                    if not piece.data or hash_of(piece.data) != piece.digest:
                        raise OSError(f"{file.name}: bytes were damaged on the way")
                    output.write(piece.data)
                    digest.update(piece.data)
                    start += len(piece.data)
            digests[file.name] = digest.hexdigest()
        if self._list(path) != files:
            raise FilesChangedError(f"the files in {path} were replaced while they were copied")
        write_checksums(folder, digests)


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
