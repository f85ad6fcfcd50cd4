"""Reads the files of adapters in pieces, for nodes that do not see them."""

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.engine.adapters.open_file import NotRegularFileError, open_regular_file, root_of
from loraplex.engine.adapters.paths import ADAPTER_FILE, WEIGHTS_FILE

PIECE_BYTES = 8 << 20
NAMES = (
    ADAPTER_FILE, WEIGHTS_FILE,
    "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json",
)  # fmt: skip
"""The files of a folder that a reader of adapters looks at."""


class FilesChangedError(OSError):
    """The files were replaced while they were read."""


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file as it is now. A file system that two nodes share gives both the same numbers."""

    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FilePiece:
    """Some bytes of a file, and their BLAKE2b hash."""

    data: bytes
    digest: str

    @classmethod
    def of(cls, data: bytes) -> "FilePiece":
        return cls(data, hash_of(data))


class AdapterFiles:
    """Lists and reads folders of this machine. Usable from any thread."""

    def __init__(self, adapter_roots: Sequence[str] = ()) -> None:
        """Files below one of `adapter_roots`, as root_of() takes them, are opened beneath it."""
        self._roots = adapter_roots

    def list_files(self, path: str) -> list[FolderFile]:
        """Returns the files of an adapter's folder, in the order of NAMES.

        Raises OSError if there is no such folder, or a file is none or cannot be opened.
        """
        found = set(os.listdir(path))
        return [self._look(path, name) for name in NAMES if name in found]

    def read(self, path: str, file: FolderFile, start: int) -> FilePiece:
        """Returns up to PIECE_BYTES from `start` on.

        Raises:
            FilesChangedError: the file is not as it was listed.
            OSError: it cannot be read.
        """
        with open_regular_file(Path(path, file.name), self._root_of(path)) as descriptor:
            data = os.pread(descriptor, min(PIECE_BYTES, file.num_bytes - start), start)
            if _describe(descriptor, file.name) != file:
                raise FilesChangedError(f"{path}/{file.name} was replaced while it was read")
        return FilePiece.of(data)

    def _root_of(self, path: str) -> str:
        return root_of(Path(path), self._roots)

    def _look(self, path: str, name: str) -> FolderFile:
        try:
            with open_regular_file(Path(path, name), self._root_of(path)) as descriptor:
                return _describe(descriptor, name)
        except NotRegularFileError as error:
            raise PermissionError(errno.EPERM, str(error), path) from None


def hash_of(data: bytes) -> str:
    """Returns the hash of a FilePiece."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _describe(descriptor: int, name: str) -> FolderFile:
    status = os.fstat(descriptor)
    return FolderFile(name, status.st_size, status.st_mtime_ns)
