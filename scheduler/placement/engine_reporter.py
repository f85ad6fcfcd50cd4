"""Makes the reports of one engine from its scheduler."""

from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.scheduler import Scheduler

RATE_FADE = 0.999  # of the highest rate, at each report


class EngineReporter:
    """Reports the scheduler's load and the adapters that changed since the last report."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        prefill_tokens_per_second: float | None = None,
        load_seconds: float | None = None,
    ) -> None:
        """Makes the reporter for one router.

        Args:
            prefill_tokens_per_second: None: the highest rate of computed tokens lately.
            load_seconds: time to bring an adapter to the device; None: the mean so far.
        """
        self._scheduler = scheduler
        self._fixed_rate = prefill_tokens_per_second
        self._fixed_load_seconds = load_seconds
        self._reported: dict[str, float] = {}
        self._last_steps = self._last_tokens = 0
        self._last_at = 0.0
        self._steps_per_second = self._best_rate = 0.0

    def report(self, *, num_received: int, now: float) -> EngineReport:
        """Returns the load at `now`, in seconds by any steady clock."""
        scheduler = self._scheduler
        load_seconds = self._load_seconds()
        adapters = {
            adapter.content_hash: load_seconds if adapter.is_loading else 0.0
            for adapter in scheduler.memory.adapters
        }
        changed = dict(adapters.items() - self._reported.items())
        dropped = list(self._reported.keys() - adapters.keys())
        self._reported = adapters
        self._measure_rates(now)
        fixed_rate = self._fixed_rate
        return EngineReport(
            num_received=num_received,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            max_running=scheduler.running.max_num_seqs,
            waiting_tokens=self._waiting_tokens(),
            free_pages=scheduler.memory.num_available,
            num_pages=scheduler.memory.blocks.num_usable,
            prefill_tokens_per_second=self._best_rate if fixed_rate is None else fixed_rate,
            steps_per_second=self._steps_per_second,
            cold_load_seconds=load_seconds,
            adapters=changed,
            dropped_adapters=dropped,
        )

    def _measure_rates(self, now: float) -> None:
        counters = self._scheduler.counters
        seconds = now - self._last_at
        if self._last_at and seconds > 0:
            self._steps_per_second = (counters.num_steps - self._last_steps) / seconds
            rate = (counters.num_scheduled_tokens - self._last_tokens) / seconds
            self._best_rate = max(rate, self._best_rate * RATE_FADE)
        self._last_steps, self._last_tokens = counters.num_steps, counters.num_scheduled_tokens
        self._last_at = now

    def _load_seconds(self) -> float:
        if self._fixed_load_seconds is not None:
            return self._fixed_load_seconds
        counters = self._scheduler.counters
        return counters.adapter_load_us / 1e6 / max(1, counters.num_adapter_loads)

    def _waiting_tokens(self) -> int:
        scheduler = self._scheduler
        waiting = sum(len(request.token_ids) for request in scheduler.waiting)
        left = (request.num_total - request.num_scheduled for request in scheduler.running)
        planned = scheduler.num_prompt_tokens_in_flight
        return waiting + sum(num_tokens for num_tokens in left if num_tokens > 1) + planned
