"""Makes the live view of an engine from its replies to `stats` and `list_adapters`."""

import time
from collections.abc import Callable
from typing import Any

from loraplex.entrypoints.live.adapter_rows import adapter_rows, slots_of
from loraplex.entrypoints.live.live_window import LiveWindow

PERIOD_S = 0.5
POOL_CELLS = 8192
LISTED_PER_SECOND = 500
"""Adapters that the scheduler describes a second for the list, which bounds its work."""

_LOAD = ("running", "waiting", "waiting_for_adapter", "steps_in_flight")
_PAGES = ("num_pages", "pages_free", "pages_kv", "pages_prefix", "pages_adapter", "pages_pinned")
_ADAPTERS = (
    "registered_adapters", "num_resident_adapters", "host_adapters", "pinned_adapters",
    "num_adapter_loads", "num_adapter_load_failures", "num_adapter_unloads",
)  # fmt: skip
_TOTALS = (
    "num_requests", "num_generated_tokens", "num_scheduled_tokens", "num_preemptions",
    "prefix_query_tokens", "prefix_hit_tokens",
)  # fmt: skip


class LiveFeed:
    """Takes replies now and then, and returns the present view. docs/reference/http.md has it."""

    def __init__(self, model: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`model` is the base model's name."""
        self._model = model
        self._clock = clock
        self._window = LiveWindow()
        self._stats: dict[str, Any] = {}
        self._listed: list[dict[str, Any]] = []
        self._list_due_at = clock()

    @property
    def needs_list(self) -> bool:
        """Tells whether add_list() is due: the longer the list, the seldomer."""
        return self._clock() >= self._list_due_at

    def add_list(self, adapters: list[dict[str, Any]]) -> None:
        """Takes the rows of a reply to `list_adapters`."""
        self._listed = adapters
        self._list_due_at = self._clock() + max(2 * PERIOD_S, len(adapters) / LISTED_PER_SECOND)

    def add_stats(self, stats: dict[str, Any]) -> None:
        """Takes a reply to `stats` with `pool_cells`. A new name makes the list due."""
        before = self._stats.get("registered_adapters")
        if before is not None and stats.get("registered_adapters") != before:
            self._list_due_at = min(self._list_due_at, self._clock() + PERIOD_S)
        self._stats = stats
        self._window.add(stats, self._clock())

    def view(self) -> dict[str, Any]:
        """Returns the view. Call it after add_stats()."""
        stats, resident = self._stats, self._stats.get("resident_adapters", [])
        rows = adapter_rows(self._listed, resident)
        return {
            "time": time.time(),
            "model": self._model,
            "load": self._load(),
            "rates": {name: round(rate, 2) for name, rate in self._window.rates().items()},
            "first_token": self._window.first_tokens(),
            "pages": _picked(stats, _PAGES),
            "totals": _picked(stats, _TOTALS),
            "adapter_counts": _picked(stats, _ADAPTERS),
            "adapters": rows,
            "num_adapters_left_out": len(self._listed) - len(rows),
            "pools": [
                {**pool, "slots": slots_of(resident, pool["engine"])}
                for pool in stats.get("pools", [])
            ],
        }

    def _load(self) -> dict[str, int]:
        """Returns the load; requests that no engine of a cluster has room for wait too."""
        load = _picked(self._stats, _LOAD)
        load["waiting"] += self._stats.get("router", {}).get("waiting", 0)
        return load


def _picked(stats: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: stats.get(key, 0) for key in keys}
