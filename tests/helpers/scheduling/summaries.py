"""Summaries of engines for tests of placement."""

from dataclasses import replace
from random import Random
from typing import Any

from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.placement.engine_summary import EngineSummary

SEATS = 8


def summary(engine_id: str, **fields: Any) -> EngineSummary:
    """An engine with two running requests and room for six more."""
    engine = EngineSummary(
        engine_id=engine_id,
        running=2,
        waiting=0,
        max_running=SEATS,
        waiting_tokens=100,
        free_pages=50,
        num_pages=50,
        prefill_tokens_per_second=1000.0,
        steps_per_second=50.0,
        age_seconds=0.1,
        cold_load_seconds=0.5,
    )
    return replace(engine, **fields)


def random_summary(engine_id: str, random: Random) -> EngineSummary:
    """An engine in any state: full, late or draining ones included."""
    return summary(
        engine_id,
        running=random.randint(0, SEATS),
        waiting=random.randint(0, 2),
        waiting_tokens=random.randint(0, 9000),
        free_pages=random.randint(0, 50),
        age_seconds=random.choice([0.1, 0.9, 1.1, 9.0]),
        draining=random.random() < 0.2,
    )


def report(num_received: int = 0, **fields: Any) -> EngineReport:
    """The report of an idle engine with 100 pages."""
    values: dict[str, Any] = {
        "running": 0, "waiting": 0, "max_running": SEATS, "waiting_tokens": 0, "free_pages": 100,
        "num_pages": 100, "prefill_tokens_per_second": 1000.0, "steps_per_second": 50.0,
        "cold_load_seconds": 0.5,
    }  # fmt: skip
    return EngineReport(num_received=num_received, **values | fields)
