"""The list of a cluster's engines, a file that the supervisor writes and routers read.

A router that restarts finds its engines there again.
"""

from pathlib import Path

import msgspec

from loraplex.engine.cluster.run_files import write_json

FILE_NAME = "engines.json"


class ListedEngine(msgspec.Struct, frozen=True):
    """One engine that is up. An engine that comes back has another id."""

    engine_id: str
    endpoint: str  # of its scheduler, for frontends and routers
    draining: bool = False


class ScaleCounts(msgspec.Struct, frozen=True):
    """The bounds of the number of engines, and the decisions to change it so far."""

    min_engines: int
    max_engines: int
    started: int = 0
    released: int = 0
    failed: int = 0  # starts that came to nothing
    last: str = ""  # decision, with its numbers

    def count(self, kind: str, text: str) -> "ScaleCounts":
        """Returns the counts after one more decision, "started", "released" or "failed"."""
        return msgspec.structs.replace(self, **{kind: getattr(self, kind) + 1, "last": text})


class EngineList(msgspec.Struct, frozen=True):
    """All engines that are up, and how requests are placed on them.

    With `scale`, routers tell their load.
    """

    placement: str
    engines: list[ListedEngine] = []
    scale: ScaleCounts | None = None

    def write(self, folder: Path) -> None:
        """Replaces the list in `folder`."""
        write_json(folder / FILE_NAME, self)


class EngineListReader:
    """Tells when the list has changed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._seen = b""

    def read(self) -> EngineList | None:
        """Returns the list if it is new since the last call."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        if data == self._seen:
            return None
        self._seen = data
        return msgspec.json.decode(data, type=EngineList)
