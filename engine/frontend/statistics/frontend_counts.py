"""Keeps the counts of a frontend in files that all processes of an engine can read."""

from dataclasses import dataclass, field
from pathlib import Path

from loraplex.engine.frontend.statistics.request_histograms import RequestHistograms
from loraplex.engine.ipc.shared_numbers import map_numbers
from loraplex.engine.stores.store_counts import StoreCounts
from loraplex.scheduler.statistics.bucket_counts import zeros

_REQUESTS, _STORES = "requests.", "stores."  # begin the names of the files in the run directory


@dataclass(frozen=True, slots=True)
class FrontendCounts:
    """The counts of one frontend, or of all.

    Attributes:
        requests: of the requests that have ended.
        stores: of the adapter stores.
    """

    requests: RequestHistograms = field(default_factory=RequestHistograms)
    stores: StoreCounts = field(default_factory=StoreCounts)

    @classmethod
    def in_run_dir(cls, run_dir: str, frontend: str) -> "FrontendCounts":
        """Returns the counts of a frontend in its files.

        A frontend that was started again goes on with what the one before has counted.
        """
        name = frontend.replace(" ", "-")
        requests = map_numbers(f"{run_dir}/{_REQUESTS}{name}", RequestHistograms.NUM_CELLS)
        stores = map_numbers(f"{run_dir}/{_STORES}{name}", StoreCounts.NUM_CELLS)
        return cls(RequestHistograms(requests), StoreCounts(stores))

    @classmethod
    def sum_in(cls, run_dir: str) -> "FrontendCounts":
        """Returns what all frontends have counted, those included that have died."""
        requests = _sum(run_dir, _REQUESTS, RequestHistograms.NUM_CELLS)
        stores = _sum(run_dir, _STORES, StoreCounts.NUM_CELLS)
        return cls(RequestHistograms(requests), StoreCounts(stores))


def _sum(run_dir: str, prefix: str, num_cells: int) -> "memoryview[float]":
    total = zeros(num_cells)
    for path in Path(run_dir).glob(f"{prefix}*"):
        for i, number in enumerate(map_numbers(str(path), num_cells)):
            total[i] += number
    return total
