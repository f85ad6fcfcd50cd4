"""Pushes the engine's load to the routers that ask for it."""

from dataclasses import dataclass

from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.placement.engine_reporter import EngineReporter
from loraplex.scheduler.scheduler import Scheduler

REPORT_S = 0.02  # between reports while requests are unfinished
HEARTBEAT_S = 0.25  # between reports of an idle engine


@dataclass(slots=True)
class _Router:
    reporter: EngineReporter
    num_received: int = 0
    last_at: float = -1.0
    num_unfinished: int = -1  # at the last report


class LoadReports:
    """Knows the routers and when each gets its next report."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._routers: dict[bytes, _Router] = {}

    def add(self, peer: bytes) -> None:
        """Report to this peer from now on, its first report in full."""
        self._routers[peer] = _Router(EngineReporter(self._scheduler))

    def remove(self, peer: bytes) -> None:
        """Report to this peer no more, if it was reported to."""
        self._routers.pop(peer, None)

    def on_request(self, peer: bytes) -> None:
        """Count a request of a peer, be it a router or not."""
        if peer in self._routers:
            self._routers[peer].num_received += 1

    @property
    def due_s(self) -> float | None:
        """Seconds until take() has something; None without routers."""
        now = self._scheduler.clock()
        return min((self._due_at(router) - now for router in self._routers.values()), default=None)

    def take(self) -> list[tuple[bytes, EngineReport]]:
        """Returns the reports that are due, by peer."""
        if not self._routers:
            return []
        now = self._scheduler.clock()
        reports = []
        for peer, router in self._routers.items():
            if self._due_at(router) <= now:
                router.last_at, router.num_unfinished = now, self._scheduler.num_unfinished
                report = router.reporter.report(num_received=router.num_received, now=now)
                reports.append((peer, report))
        return reports

    def _due_at(self, router: _Router) -> float:
        num_unfinished = self._scheduler.num_unfinished
        is_idle = num_unfinished == 0 == router.num_unfinished
        return router.last_at + (HEARTBEAT_S if is_idle else REPORT_S)
