"""The router's view of its engines: their last reports and what was sent to them since."""

from collections import deque
from dataclasses import dataclass, field

from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.placement.engine_summary import EngineSummary
from loraplex.scheduler.placement.placement_request import PlacementRequest


@dataclass(slots=True)
class _EngineView:
    report: EngineReport
    reported_at: float
    load_seconds: dict[str, float] = field(default_factory=dict)
    unhashed: set[str] = field(default_factory=set)
    num_sent: int = 0
    unreported: deque[PlacementRequest] = field(default_factory=deque)  # sent, not yet in a report


class ClusterView:
    """Keeps one summary of each engine up to date.

    A report says how many requests had come when it was made. Requests sent after these are added
    to its figures, so two requests in a row do not take the same seat.
    """

    def __init__(self) -> None:
        self._engines: dict[str, _EngineView] = {}
        self._draining: set[str] = set()

    def __len__(self) -> int:
        return len(self._engines)

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._engines

    def apply(self, engine_id: str, report: EngineReport, now: float) -> None:
        """Take in a report; the first one adds the engine."""
        engine = self._engines.get(engine_id)
        if engine is None:
            engine = self._engines[engine_id] = _EngineView(report, now)
        engine.report, engine.reported_at = report, now
        engine.load_seconds.update(report.adapters)
        for content_hash in report.dropped_adapters:
            engine.load_seconds.pop(content_hash, None)
        while len(engine.unreported) > engine.num_sent - report.num_received:
            engine.unreported.popleft()

    def remove(self, engine_id: str) -> None:
        """Forget an engine that has left or died. Unknown ids do no harm."""
        self._engines.pop(engine_id, None)
        self._draining.discard(engine_id)

    def drain(self, engine_id: str) -> None:
        """Place nothing on an engine any more, from its first report on."""
        self._draining.add(engine_id)

    def is_draining(self, engine_id: str) -> bool:
        """Tells whether drain() was called for an engine."""
        return engine_id in self._draining

    def on_sent(self, engine_id: str, request: PlacementRequest) -> None:
        """Count a request that goes to an engine."""
        engine = self._engines[engine_id]
        engine.num_sent += 1
        engine.unreported.append(request)
        if request.content_hash:
            engine.load_seconds.setdefault(request.content_hash, engine.report.cold_load_seconds)
            engine.unhashed.discard(request.home)
        elif request.home:
            engine.unhashed.add(request.home)

    def summaries(self, now: float) -> list[EngineSummary]:
        """Returns the summary of each engine."""
        return [
            self._summary(engine_id, engine, now) for engine_id, engine in self._engines.items()
        ]

    def _summary(self, engine_id: str, engine: _EngineView, now: float) -> EngineSummary:
        report, sent = engine.report, engine.unreported
        return EngineSummary(
            engine_id=engine_id,
            running=report.running,
            waiting=report.waiting + len(sent),
            max_running=report.max_running,
            waiting_tokens=report.waiting_tokens + sum(r.prompt_tokens for r in sent),
            free_pages=max(0, report.free_pages - sum(r.pages for r in sent)),
            num_pages=report.num_pages,
            prefill_tokens_per_second=report.prefill_tokens_per_second,
            steps_per_second=report.steps_per_second,
            age_seconds=now - engine.reported_at,
            cold_load_seconds=report.cold_load_seconds,
            load_seconds=engine.load_seconds,
            unhashed=engine.unhashed,
            draining=self.is_draining(engine_id),
        )
