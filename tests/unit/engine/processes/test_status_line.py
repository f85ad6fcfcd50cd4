"""The status line of a server: now and then while it works, never while it is idle."""

from typing import Any

from loraplex.engine.processes.status_line import INTERVAL_S, StatusLine


class FakeEngine:
    def __init__(self) -> None:
        self.now = 50.0
        self.values = dict.fromkeys(
            ("running", "waiting", "num_generated_tokens", "num_scheduled_tokens", "pages_free",
             "pages_prefix", "num_resident_adapters"), 0
        ) | {"num_pages": 1000}  # fmt: skip
        self.line = StatusLine(lambda: self.values, clock=lambda: self.now)

    def after(self, seconds: float, num_unfinished: int, **values: Any) -> str | None:
        self.now += seconds
        self.values |= values
        return self.line.take(num_unfinished)


def test_idle_engine_says_nothing_and_needs_no_turn() -> None:
    engine = FakeEngine()
    for _ in range(20):
        assert engine.after(INTERVAL_S, 0) is None
        assert engine.line.due_s is None


def test_rates_are_those_of_the_interval() -> None:
    engine = FakeEngine()
    assert engine.after(1000, 3) is None  # the interval begins with the work
    assert engine.line.due_s == INTERVAL_S
    assert engine.after(INTERVAL_S / 2, 3) is None
    assert engine.line.due_s == INTERVAL_S / 2
    line = engine.after(
        INTERVAL_S / 2, 3, running=2, waiting=1, num_generated_tokens=5000,
        num_scheduled_tokens=20_000, pages_free=900, pages_prefix=7, num_resident_adapters=4,
    )  # fmt: skip
    assert line == (
        "2 running, 1 waiting; 500 new tokens/s, 2,000 computed; 900 of 1,000 pages free, "
        "7 cached; 4 adapters in pages"
    )
    line = engine.after(INTERVAL_S, 3, num_generated_tokens=5010)
    assert line is not None and "; 1 new tokens/s, 0 computed;" in line


def test_last_line_comes_after_the_last_request() -> None:
    engine = FakeEngine()
    engine.after(1, 1)
    assert engine.after(2, 0) is None
    assert engine.line.due_s == INTERVAL_S - 2
    assert engine.after(INTERVAL_S, 0) is not None
    assert engine.line.due_s is None
    assert engine.after(INTERVAL_S, 0) is None
