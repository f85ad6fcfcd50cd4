"""Which adapter commands are overdue, look by look, and which ranks hang."""

import math
from typing import Any

import pytest

from loraplex.engine.processes.adapter_deadlines import LOOK_S, AdapterDeadlines
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    int_array,
)

ANSWER_S, HANG_S = 10, 30


def load(slot: int) -> LoadAdapter:
    return LoadAdapter(slot, f"hash {slot}", f"/{slot}", int_array([slot]))


def loaded(slot: int) -> AdapterLoaded:
    return AdapterLoaded(slot, f"hash {slot}")


def inspect(number: int) -> InspectAdapter:
    return InspectAdapter(f"a{number}", f"/{number}")


def plan() -> StepPlan:
    empty = int_array()
    return StepPlan(0, empty, [], empty, empty, empty, empty, empty, empty)


class Watch:
    """Deadlines of some ranks, and a clock that moves when told."""

    def __init__(self, num_ranks: int = 1, hang_s: float = HANG_S) -> None:
        self.now = 0.0
        self.deadlines = AdapterDeadlines(
            num_ranks, hang_s=hang_s, answer_s=ANSWER_S, clock=lambda: self.now
        )

    def send(self, *commands: Any) -> None:
        for command in commands:
            self.deadlines.add(command)

    def answer(self, *answers: Any, rank: int = 0) -> None:
        for answer in answers:
            self.deadlines.on_answer(rank, answer)

    def look(self, seconds: float = LOOK_S) -> list[str]:
        """Returns the paths that are overdue at the last look of this time."""
        paths: list[str] = []
        for _ in range(round(seconds / LOOK_S)):
            self.now += LOOK_S
            self.found = self.deadlines.look()
            paths = [overdue.command.path for overdue in self.found]
        return paths

    @property
    def hung(self) -> list[tuple[int, str]]:
        return [(overdue.rank, overdue.hang) for overdue in self.found if overdue.hang]


def test_nothing_is_due_without_a_command_that_is_answered() -> None:
    watch = Watch()
    watch.send(DropAdapter("x"), plan())
    assert watch.deadlines.due_s is None
    watch.now += 100  # no look was needed
    watch.send(load(1))
    assert watch.deadlines.due_s == LOOK_S
    assert watch.look(ANSWER_S - LOOK_S) == []
    watch.answer(loaded(1))
    assert watch.deadlines.due_s is None


@pytest.mark.parametrize(("command", "verb"), [(load(1), "loading"), (inspect(1), "reading")])
def test_a_command_without_an_answer_names_rank_and_work(command: Any, verb: str) -> None:
    watch = Watch(num_ranks=2)
    watch.send(command)
    watch.answer(loaded(1), AdapterInspected("a1", "/1"), rank=0)
    assert watch.look(ANSWER_S - LOOK_S) == []
    assert watch.look() == ["/1"]
    (overdue,) = watch.found
    assert overdue.is_new and not overdue.hang
    assert overdue.text == f"worker 1 has not finished {verb} it within 10 s"
    assert watch.look() == ["/1"] and not watch.found[0].is_new  # until it is answered
    watch.answer(loaded(1), AdapterInspected("a1", "/1"), rank=1)
    assert watch.look() == [] and watch.deadlines.due_s is None


def test_a_long_queue_that_moves_is_never_late() -> None:
    """The last of 50 loads waits 450 s for those before it."""
    watch = Watch()
    watch.send(*map(load, range(50)))
    for slot in range(50):
        assert watch.look(ANSWER_S - LOOK_S) == []
        watch.answer(loaded(slot))


def test_one_load_is_stuck_and_later_ones_are_answered() -> None:
    watch = Watch()
    watch.send(load(0), load(1), load(2))
    assert watch.look(ANSWER_S - 2) == []
    watch.answer(loaded(1))
    assert watch.look(2) == ["/0"]
    assert watch.look(ANSWER_S - 3) == ["/0"]
    assert watch.look() == ["/0", "/2"]  # for this long no load before it was answered
    watch.send(load(3))
    watch.answer(loaded(3))
    assert watch.look(10 * HANG_S) == ["/0", "/2"]
    assert not watch.hung  # it answers what came later
    watch.answer(loaded(0))
    assert watch.look() == ["/2"]


def test_a_rank_that_falls_silent_hangs() -> None:
    watch = Watch(num_ranks=2)
    watch.send(load(0), inspect(1))
    for rank in range(2):
        watch.answer(AdapterInspected("a1", "/1"), rank=rank)
    watch.answer(loaded(0))
    watch.send(inspect(2))
    for rank in range(2):
        watch.answer(AdapterInspected("a2", "/2"), rank=rank)  # by other threads than loads
    assert watch.look(HANG_S - LOOK_S) == ["/0"] and not watch.hung
    watch.look()
    assert watch.hung == [
        (1, "has not finished loading the adapter at /0 within 30 s, nor any that came later")
    ]


def test_a_rank_may_be_silent_for_ever_without_a_watchdog() -> None:
    watch = Watch(hang_s=math.inf)
    watch.send(load(0))
    assert watch.look(1000) == ["/0"] and not watch.hung


def test_a_pause_of_the_scheduler_blames_nobody() -> None:
    watch = Watch()
    watch.send(load(0))
    watch.now += 1000
    assert watch.deadlines.due_s == 0 and watch.deadlines.look() == []


def test_a_step_that_runs_stops_the_clock() -> None:
    watch = Watch()
    watch.send(plan(), plan(), load(0))
    assert watch.look(10 * ANSWER_S) == []
    watch.answer(StepResult(0, int_array()))
    for _ in range(ANSWER_S - 1):  # short steps
        assert watch.look() == []
        watch.answer(StepResult(0, int_array()))
        watch.send(plan())
    assert watch.look() == ["/0"]
