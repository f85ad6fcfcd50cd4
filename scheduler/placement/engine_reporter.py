"""Makes the reports of one engine from its scheduler."""

from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.scheduler import Scheduler


class EngineReporter:
    """Reports the scheduler's load and the adapters that changed since the last report."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        max_running: int,
        prefill_tokens_per_second: float,
        load_seconds: float,
    ) -> None:
        """`load_seconds` is the usual time to bring an adapter to the device."""
        self._scheduler = scheduler
        self._max_running = max_running
        self._prefill_tokens_per_second = prefill_tokens_per_second
        self._load_seconds = load_seconds
        self._reported: dict[str, float] = {}
        self._last_steps = 0
        self._last_at = 0.0
        self._steps_per_second = 0.0

    def report(self, *, num_received: int, now: float, draining: bool = False) -> EngineReport:
        """Returns the load at `now`, in seconds by any steady clock."""
        scheduler = self._scheduler
        adapters = {
            adapter.content_hash: self._load_seconds if adapter.is_loading else 0.0
            for adapter in scheduler.memory.adapters
        }
        changed = dict(adapters.items() - self._reported.items())
        dropped = list(self._reported.keys() - adapters.keys())
        self._reported = adapters
        self._measure_steps(now)
        return EngineReport(
            num_received=num_received,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            max_running=self._max_running,
            waiting_tokens=self._waiting_tokens(),
            free_pages=scheduler.memory.num_available,
            num_pages=scheduler.memory.blocks.num_usable,
            prefill_tokens_per_second=self._prefill_tokens_per_second,
            steps_per_second=self._steps_per_second,
            cold_load_seconds=self._load_seconds,
            adapters=changed,
            dropped_adapters=dropped,
            draining=draining,
        )

    def _measure_steps(self, now: float) -> None:
        num_steps = self._scheduler.num_steps
        if now > self._last_at:
            self._steps_per_second = (num_steps - self._last_steps) / (now - self._last_at)
        self._last_steps, self._last_at = num_steps, now

    def _waiting_tokens(self) -> int:
        waiting = sum(len(request.token_ids) for request in self._scheduler.waiting)
        left = (request.num_total - request.num_scheduled for request in self._scheduler.running)
        return waiting + sum(num_tokens for num_tokens in left if num_tokens > 1)
