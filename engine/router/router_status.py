"""Describes a cluster's engines, for `loraplex cluster status`."""

from collections.abc import Iterable
from typing import Any

from loraplex.scheduler.placement.engine_summary import EngineSummary
from loraplex.scheduler.placement.placement import MAX_AGE_SECONDS


def describe_engines(
    engine_ids: Iterable[str], summaries: Iterable[EngineSummary]
) -> dict[str, dict[str, Any]]:
    """Returns a row for each connected engine; one that has not reported yet is "connecting"."""
    rows: dict[str, dict[str, Any]] = {key: {"state": "connecting"} for key in engine_ids}
    return rows | {summary.engine_id: _row(summary) for summary in summaries}


def _row(engine: EngineSummary) -> dict[str, Any]:
    state = "draining" if engine.draining else "up"
    num_loading = sum(1 for seconds in engine.load_seconds.values() if seconds)
    return {
        "state": "suspect" if engine.is_suspect(MAX_AGE_SECONDS) else state,
        "running": engine.running,
        "waiting": engine.waiting,
        "seats": engine.max_running,
        "waiting_tokens": engine.waiting_tokens,
        "free_pages": engine.free_pages,
        "pages": engine.num_pages,
        "adapters": len(engine.load_seconds) - num_loading,
        "loading": num_loading,
        "steps_per_second": round(engine.steps_per_second, 1),
        "report_age_s": round(engine.age_seconds, 3),
    }
