"""Which processes the watchdog finds hung, look by look, without a clock."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loraplex.engine.config import EngineConfig, ParallelConfig
from loraplex.engine.ipc.messages.lifecycle import ChildBeat, ChildStart
from loraplex.engine.ipc.process_state import ProcessState
from loraplex.engine.processes.process import Process, ProcessSpec
from loraplex.engine.processes.watchdog import LOOK_S, STOPPED_S, Watchdog

TIMEOUT_S = 10.0
LOOKS = int(TIMEOUT_S / LOOK_S)
STOPPED_LOOKS = int(STOPPED_S / LOOK_S)
SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


class Scene:
    """Real idle children whose beats and states the test chooses."""

    def __init__(self) -> None:
        self.states: dict[int, ProcessState] = {}
        self.processes: list[Process] = []
        self.watchdog = Watchdog(TIMEOUT_S, lambda pid: self.states.get(pid, ProcessState()))

    def add(self, kind: str, index: int = 0, num_ranks: int = 1) -> Process:
        config = replace(EngineConfig(), parallel=ParallelConfig(num_ranks))
        spec = ProcessSpec(kind, index, SLEEP)
        process = Process.spawn(spec, ChildStart(spec.name, index, "", config))
        self.processes.append(process)
        return process

    def look(self, times: int = 1, *, are_started: bool = True) -> dict[str, str]:
        """Returns the processes found hung in the last of the looks, by name."""
        found: list[tuple[Process, str]] = []
        for _ in range(times):
            assert not found, "found too early"
            found = self.watchdog.look(self.processes, are_started=are_started)
        return {process.spec.name: how for process, how in found}


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    for process in scene.processes:
        process.popen.kill()
        process.popen.wait()
        process.exited.set()
        process.close()


def beat(marks: int, *, busy: bool = True, traced: bool = False, step: int = 0, layer: int = 0):
    return ChildBeat(marks, busy, traced, step, layer)


def test_an_idle_process_may_idle_for_ever(scene: Scene) -> None:
    process = scene.add("scheduler")
    for _ in range(5 * LOOKS):
        process.beat = beat(7, busy=False)
        assert scene.look() == {}


def test_a_long_step_that_goes_on_is_no_hang(scene: Scene) -> None:
    """One layer takes nearly the whole time limit, and the step takes many times as long."""
    process = scene.add("worker")
    for layer in range(8):
        for _ in range(LOOKS - 1):
            process.beat = beat(layer, step=1, layer=layer)
            assert scene.look() == {}


def test_a_busy_process_without_progress_hangs(scene: Scene) -> None:
    process = scene.add("worker")
    process.beat = beat(3)
    assert scene.look() == {}
    for _ in range(LOOKS - 1):
        process.beat = beat(3)
        assert scene.look() == {}
    assert scene.look() == {"worker 0": "made no progress for 10 s (watchdog_timeout)"}


def test_a_process_that_sends_no_beat_hangs_even_if_it_was_idle(scene: Scene) -> None:
    process = scene.add("frontend")
    process.beat = beat(3, busy=False)
    assert scene.look(LOOKS) == {}
    assert list(scene.look()) == ["frontend 0"]


def test_only_stopped_processes_count_while_the_engine_starts(scene: Scene) -> None:
    process = scene.add("worker")
    process.beat = beat(0)
    assert scene.look(5 * LOOKS, are_started=False) == {}
    scene.states[process.popen.pid] = ProcessState(is_stopped=True)
    found = scene.look(STOPPED_LOOKS, are_started=False)
    assert found == {"worker 0": "was stopped by a signal for 3 s"}


def test_a_process_that_goes_on_in_time_is_spared(scene: Scene) -> None:
    process = scene.add("worker")
    for _ in range(4):
        scene.states[process.popen.pid] = ProcessState(is_stopped=True)
        assert scene.look(STOPPED_LOOKS - 1) == {}
        scene.states[process.popen.pid] = ProcessState()
        process.beat = beat(0, busy=False)
        assert scene.look() == {}


@pytest.mark.parametrize("by_gdb", [True, False])
def test_a_process_under_a_debugger_never_hangs(scene: Scene, by_gdb: bool) -> None:
    process = scene.add("worker")
    process.beat = beat(3, traced=not by_gdb)
    scene.states[process.popen.pid] = ProcessState(is_stopped=True, is_traced=by_gdb)
    assert scene.look(5 * LOOKS) == {}


def test_the_rank_that_did_least_is_blamed(scene: Scene) -> None:
    """Ranks 0 and 2 wait in a collective for rank 1, which stays in its layer 4."""
    for rank, layer in enumerate((5, 4, 5)):
        scene.add("worker", rank, 3).beat = beat(90, step=9, layer=layer)
    assert scene.look(LOOKS) == {}
    assert list(scene.look()) == ["worker 1"]


def test_a_stopped_rank_is_blamed_before_those_that_wait_for_it(scene: Scene) -> None:
    for rank in range(2):
        scene.add("worker", rank, 2).beat = beat(90, step=9, layer=5)
    scene.states[scene.processes[1].popen.pid] = ProcessState(is_stopped=True)
    assert list(scene.look(STOPPED_LOOKS)) == ["worker 1"]


def test_the_text_names_the_rank(scene: Scene) -> None:
    process = scene.add("worker", 1, 2)
    process.hang = "was stopped by a signal for 3 s"
    text = "worker 1 was stopped by a signal for 3 s, and was killed (worker rank 1 of 2)"
    assert process.how_it_ended() == text


def test_a_hang_that_another_process_reports_ends_all_but_a_debugged_process(scene: Scene) -> None:
    process = scene.add("worker", 1, num_ranks=2)
    for is_traced in (True, False):
        process.beat = beat(3, busy=False, traced=is_traced)
        process.reported_hang = "has not loaded it"
        assert scene.look() == ({} if is_traced else {"worker 1": "has not loaded it"})
    assert scene.look() == {}  # a report counts once: it is repeated while the worker hangs
