"""The list of a cluster's engines, a file that the supervisor writes and routers read.

A router that restarts finds its engines there again. The file is replaced as a whole, so a reader
never sees half of it.
"""

import os
from pathlib import Path

import msgspec

FILE_NAME = "engines.json"


class ListedEngine(msgspec.Struct, frozen=True):
    """One engine that is up. An engine that comes back has another id."""

    engine_id: str
    endpoint: str  # of its scheduler, for frontends and routers
    draining: bool = False


class EngineList(msgspec.Struct, frozen=True):
    """All engines that are up, and how requests are placed on them."""

    placement: str
    engines: list[ListedEngine] = []

    def write(self, folder: Path) -> None:
        """Replaces the list in `folder`."""
        path = folder / FILE_NAME
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(self))
        os.replace(draft, path)


class EngineListReader:
    """Tells when the list has changed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._seen: tuple[int, int] | None = None

    def read(self) -> EngineList | None:
        """Returns the list if it is new since the last call."""
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns)
            if seen == self._seen:
                return None
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        self._seen = seen
        return msgspec.json.decode(data, type=EngineList)
