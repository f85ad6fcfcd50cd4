"""The load that each router tells the autoscaler, in a file of the run directory."""

import contextlib
import time
from pathlib import Path

import msgspec

from loraplex.engine.cluster.run_files import write_json
from loraplex.scheduler.placement.engine_summary import EngineSummary

SIGNALS_S = 0.5  # between two writes of a router
MAX_AGE_S = 5.0  # signals that are older are of a router that has died


class ScaleSignals(msgspec.Struct, frozen=True):
    """One router's view, or the sum over all routers.

    Attributes:
        engines: without the adapters that they hold.
        num_queued: requests that no engine can take now.
        num_first_tokens: requests whose first token has come lately.
        num_in_time: those of them that came within the objective.
    """

    engines: list[EngineSummary]
    num_queued: int = 0
    num_first_tokens: int = 0
    num_in_time: int = 0

    @property
    def attainment(self) -> float:
        """Share of the first tokens that came in time; 1 if there were none."""
        return self.num_in_time / self.num_first_tokens if self.num_first_tokens else 1.0

    def write(self, folder: Path, router: str) -> None:
        """Replaces the signals of a router."""
        write_json(folder / f"signals-{router.replace(' ', '-')}.json", self)


def read_signals(folder: Path) -> ScaleSignals | None:
    """Returns the sum over the routers that live; None if there are none.

    Each router hears the load of every engine, so any one's engines are taken.
    """
    found = []
    for path in sorted(folder.glob("signals-*.json")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime <= MAX_AGE_S:
                found.append(msgspec.json.decode(path.read_bytes(), type=ScaleSignals))
    if not found:
        return None
    return ScaleSignals(
        engines=max(found, key=lambda signals: len(signals.engines)).engines,
        num_queued=sum(signals.num_queued for signals in found),
        num_first_tokens=sum(signals.num_first_tokens for signals in found),
        num_in_time=sum(signals.num_in_time for signals in found),
    )
