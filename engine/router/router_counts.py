"""Counts of what the routers of a cluster have moved and lost, and of what waits in them."""

from array import array
from pathlib import Path

from loraplex.engine.ipc.shared_numbers import map_numbers
from loraplex.engine.router.request_book import RequestBook
from loraplex.scheduler.statistics.bucket_counts import zeros

GROWING = ("moves", "recomputed_tokens", "lost_engines")
PRESENT = ("unfinished", "waiting")
_NAMES = (*GROWING, *PRESENT)
_FILES = "routers."  # begins the names of the routers' files in the run directory


class RouterCounts:
    """Counts of one router, in a file that all routers read."""

    def __init__(self, cells: "memoryview[float] | None" = None, folder: Path | None = None):
        """Goes on with the growing counts of `cells`; without them there is one router."""
        self._cells = zeros(len(_NAMES)) if cells is None else cells
        self._folder = folder
        self._before = list(self._cells[: len(GROWING)])

    @classmethod
    def in_run_dir(cls, run_dir: str, router: str) -> "RouterCounts":
        """Counts for a router in a file. One that is started again goes on with it."""
        folder = Path(run_dir)
        path = folder / (_FILES + router.replace(" ", "-"))
        return cls(map_numbers(str(path), len(_NAMES)), folder)

    def write(self, book: RequestBook, num_lost_engines: int) -> None:
        """Tells the present counts since this router's start."""
        growing = (book.num_moves, book.num_recomputed_tokens, num_lost_engines)
        values = [a + b for a, b in zip(self._before, growing, strict=True)]
        for i, value in enumerate((*values, len(book), book.num_waiting)):
            self._cells[i] = value

    def total(self) -> dict[str, int]:
        """Returns the sums over all routers, by name.

        Each router sees the same engines end, so "lost_engines" is the largest count.
        """
        found = [array("d", self._cells)]
        if self._folder is not None:
            read = [array("d", path.read_bytes()) for path in self._folder.glob(f"{_FILES}*")]
            found = [cells for cells in read if cells]  # a router that begins has none yet
        columns = dict(zip(_NAMES, zip(*found, strict=True), strict=True))
        total = {name: int(sum(column)) for name, column in columns.items()}
        return total | {"lost_engines": int(max(columns["lost_engines"]))}
