"""A benchmark's session without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError, QueueFullError
from loraplex.entrypoints.bench.measure import Timeline
from loraplex.entrypoints.bench.results import Results
from loraplex.entrypoints.bench.session import BenchSession
from loraplex.entrypoints.bench.traces import TraceRequest


def session(error: Exception | None = None, **stats: Any) -> BenchSession:
    """A session whose engine has a context of 32 tokens and ends every request with `error`."""
    engine: Any = SimpleNamespace(
        info=SimpleNamespace(max_model_len=32, vocab_size=9),
        client=SimpleNamespace(stats=lambda: stats),
        death=lambda wait_s: "worker 0 was killed",
    )
    generator: Any = SimpleNamespace(
        run=lambda trace, prompts, title: [Timeline(0.0, error=error) for _ in trace]
    )
    results = Results(None, None, lambda rows: [])
    return BenchSession(EngineConfig(), engine, generator, [], {}, results)


def test_requests_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="33 tokens exceeds the engine's context of 32"):
        session().measure([TraceRequest(None, 16, 16), TraceRequest(None, 16, 17)], title="")


def test_a_dead_engine_ends_the_run_with_its_reason() -> None:
    with pytest.raises(EngineDeadError, match="worker 0 was killed"):
        session(EngineDeadError("gone")).measure([TraceRequest(None, 1, 1)], title="")


def test_a_refused_request_is_left_to_the_caller() -> None:
    (timeline,) = session(QueueFullError("full")).measure([TraceRequest(None, 1, 1)], title="")
    assert isinstance(timeline.error, QueueFullError)


def test_counters_are_the_numbers_of_the_engine() -> None:
    found = session(num_steps=3, policy="fcfs", idle_us=1.0)
    assert found.counters() == {"num_steps": 3, "idle_us": 1.0}


def test_idle_share_is_of_the_time_between_two_readings() -> None:
    before, after = {"idle_us": 5, "busy_us": 10}, {"idle_us": 8, "busy_us": 19}
    assert BenchSession.idle_share(before, after) == 0.25
    assert BenchSession.idle_share(after, after) == 0.0
