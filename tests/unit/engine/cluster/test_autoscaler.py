"""The autoscaler's decisions become engines, and idle engines are emptied before they end."""

import threading
from typing import Any

import pytest

from loraplex.engine.cluster.autoscaler import EMPTY_TIMEOUT_S, RETRY_S, Autoscaler
from loraplex.engine.cluster.engine_slots import EngineSlots
from loraplex.engine.cluster.scale_signals import ScaleSignals
from loraplex.engine.errors import ConfigError
from loraplex.scheduler.placement.scaling import ScalePolicy

from helpers.running.processes import wait_until
from helpers.scheduling.summaries import summary

HOLD_S = 10.0
SEATS = 10


class FakeEngine:
    """Is up at once, and lives until it is stopped."""

    info: Any = None
    pids: dict[str, int] = {}  # noqa: RUF012
    dead_reason = None
    scheduler_endpoint = "ipc://nowhere"

    def __init__(self, failure: Exception | None) -> None:
        self._failure = failure
        self.ended = threading.Event()

    def start(self, timeout_s: float = 0.0) -> None:
        if self._failure is not None:
            raise self._failure

    def wait(self, timeout_s: float | None = None) -> int:
        self.ended.wait()
        return 0

    def stop(self) -> None:
        self.ended.set()


class FakeLauncher:
    failure: Exception | None = None

    def __init__(self) -> None:
        self.released: list[int] = []

    def open(self, num_engines: int) -> None: ...

    def make_engine(self, index: int) -> FakeEngine:
        return FakeEngine(self.failure)

    def release(self, index: int) -> None:
        self.released.append(index)

    def close(self) -> None: ...

    def describe(self) -> str:
        return "fakes"


class ScaledSlots:
    def __init__(self) -> None:
        self.launcher = FakeLauncher()
        self.slots = EngineSlots(self.launcher, lambda: None)
        self.slots.add()
        self.scaler = Autoscaler(
            self.slots,
            ScalePolicy(min_engines=1, max_engines=2, hold_s=HOLD_S),
            read_signals=lambda: None,
            on_change=lambda: None,
        )
        self.await_up(1)

    def await_up(self, count: int) -> None:
        wait_until(lambda: len(self.slots.engines) == count)

    def look(self, running: int, now: float, **signals: Any) -> None:
        """Lets the autoscaler see this many requests on each engine that is up."""
        draining = {listed.engine_id for listed in self.slots.listed if listed.draining}
        engines = [
            summary(key, running=running, max_running=SEATS, draining=key in draining)
            for key in self.slots.engines
        ]
        self.scaler.look(ScaleSignals(engines, **signals), now)


@pytest.fixture
def scaled() -> ScaledSlots:
    return ScaledSlots()


def test_load_starts_an_engine_and_no_more_than_allowed(scaled: ScaledSlots) -> None:
    scaled.look(SEATS, now=0.0)
    scaled.await_up(2)
    for now in range(1, 4):
        scaled.look(SEATS, now=float(now), num_queued=5)
    assert len(scaled.slots) == 2
    counts = scaled.scaler.counts
    assert (counts.started, counts.released, counts.failed) == (1, 0, 0)
    assert counts.last.startswith("start an engine: 1 engines, room for 0.00")


def test_requests_that_queue_or_come_late_start_an_engine(scaled: ScaledSlots) -> None:
    scaled.look(0, now=0.0, num_first_tokens=100, num_in_time=99)
    assert len(scaled.slots) == 1
    scaled.look(0, now=0.0, num_first_tokens=100, num_in_time=98)
    assert len(scaled.slots) == 2


def test_an_idle_engine_is_emptied_then_ended_and_its_name_not_used_again(
    scaled: ScaledSlots,
) -> None:
    scaled.look(SEATS, now=0.0)
    scaled.await_up(2)
    scaled.look(0, now=1.0)
    scaled.look(0, now=HOLD_S)  # not yet
    assert not any(listed.draining for listed in scaled.slots.listed)
    scaled.look(0, now=1.0 + HOLD_S)
    (name,) = [listed.engine_id for listed in scaled.slots.listed if listed.draining]
    scaled.look(1, now=2.0 + HOLD_S)
    assert len(scaled.slots) == 2, "it has requests"
    scaled.look(0, now=3.0 + HOLD_S)
    assert list(scaled.slots.engines) != [name] and len(scaled.slots.engines) == 1
    assert scaled.launcher.released == [int(name[len("engine-")])]
    scaled.look(SEATS, now=4.0 + HOLD_S)
    scaled.await_up(2)
    assert name not in scaled.slots.engines


def test_an_engine_that_does_not_get_empty_is_ended_all_the_same(scaled: ScaledSlots) -> None:
    scaled.look(SEATS, now=0.0)
    scaled.await_up(2)
    for running, now in ((0, 1.0), (0, 1.0 + HOLD_S), (1, 2.0 + HOLD_S)):
        scaled.look(running, now=now)
    assert len(scaled.slots) == 2
    scaled.look(1, now=1.0 + HOLD_S + EMPTY_TIMEOUT_S)
    assert len(scaled.slots) == 1


def test_an_engine_that_cannot_start_is_given_up_and_tried_again_later(scaled: ScaledSlots) -> None:
    scaled.launcher.failure = ConfigError("no place")
    scaled.look(SEATS, now=0.0)
    wait_until(lambda: any(slot.failure for slot in scaled.slots))
    scaled.look(SEATS, now=1.0)
    assert len(scaled.slots) == 1 and scaled.launcher.released == [1]
    assert scaled.scaler.counts.last == "engine 1 is given up: no place"
    scaled.launcher.failure = None
    scaled.look(SEATS, now=RETRY_S)
    assert len(scaled.slots) == 1
    scaled.look(SEATS, now=1.0 + RETRY_S)
    scaled.await_up(2)
    assert scaled.scaler.counts.failed == 1
