"""Several worker ranks seen as one, with ranks that answer in any order."""

import itertools
from array import array
from typing import Any

import pytest
from msgspec.structs import replace

from loraplex.engine.config import ParallelConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.channel import PeerGoneError, worker_identity
from loraplex.engine.processes.in_process import InProcessEngine
from loraplex.engine.processes.launch.engine_processes import engine_processes
from loraplex.engine.processes.worker_group import WorkerGroup, merge_ready
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    UnloadAdapter,
    WorkerReady,
    int_array,
)

from helpers.fakes.fake_engine import FakeEngineWorker, fake_config

INSPECT = InspectAdapter("a", "/a")
LOAD = LoadAdapter(3, "hash", "/a", int_array([5]))
INSPECTED = AdapterInspected("a", "/a", "", "hash", 4, 100, 8, modules=["q_proj"])
LOADED = AdapterLoaded(3, "hash")


def plan(step_id: int) -> StepPlan:
    empty = int_array()
    return StepPlan(step_id, empty, [], empty, empty, empty, empty, empty, empty)


class Ranks:
    """The ranks' end: what each has received, and what they send."""

    def __init__(self, size: int) -> None:
        self.inbox: list[tuple[bytes, Any]] = []
        self.sent: list[tuple[bytes, bytes]] = []
        self.group = WorkerGroup(self, size)

    def send_encoded(self, data: bytes, peer: bytes) -> None:
        self.sent.append((peer, data))

    def receive(self, limit: int = 1024) -> list[tuple[bytes, Any]]:
        taken, self.inbox = self.inbox[:limit], self.inbox[limit:]
        return taken

    def commands_of(self, rank: int) -> list[Any]:
        return [codec.decode(data) for peer, data in self.sent if peer == worker_identity(rank)]

    def answer(self, rank: int, *messages: object) -> list[Any]:
        """Returns the events that these messages of one rank complete."""
        self.inbox += [(worker_identity(rank), message) for message in messages]
        return self.group.receive()


def result(step_id: int, *tokens: int) -> StepResult:
    return StepResult(step_id, array("i", tokens))


def test_a_command_is_encoded_once_and_sent_to_all_ranks() -> None:
    ranks = Ranks(3)
    for command in (plan(0), INSPECT, LOAD, UnloadAdapter(1), DropAdapter("x")):
        ranks.group.send(command)
        sent, ranks.sent = ranks.sent, []
        assert [peer for peer, _ in sent] == [worker_identity(rank) for rank in range(3)]
        assert all(data is sent[0][1] for _, data in sent)
        assert codec.decode(sent[0][1]) == command


def test_one_rank_is_passed_through() -> None:
    """Nothing is tracked or renamed: the events are the objects that came."""
    ranks = Ranks(1)
    ranks.group.send(INSPECT)
    failed = replace(INSPECTED, error="bad")
    messages = [failed, LOADED, AdapterEvicted("x"), AdapterEvicted("x"), result(9)]
    events = ranks.answer(0, *messages)
    assert all(got is sent for got, sent in zip(events, messages, strict=True))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_step_ends_with_its_last_rank(order: tuple[int, ...]) -> None:
    """Whichever is last, the result is that of rank 0."""
    ranks = Ranks(3)
    ranks.group.send(plan(0))
    ranks.group.send(plan(1))
    for rank in order[:-1]:
        assert ranks.answer(rank, result(0, rank), result(1, 10 + rank)) == []
    last = order[-1]
    assert ranks.answer(last, result(0, last)) == [result(0, 0)]
    assert ranks.answer(last, result(1, 10 + last)) == [result(1, 10)]


def test_a_slow_rank_holds_up_steps_and_no_adapters() -> None:
    ranks = Ranks(2)
    for command in (plan(0), INSPECT, plan(1), LOAD):
        ranks.group.send(command)
    assert ranks.answer(0, result(0, 1), INSPECTED, result(1, 2), LOADED) == []
    assert ranks.answer(1, INSPECTED) == [replace(INSPECTED, num_bytes=200)]
    assert ranks.answer(1, LOADED, result(0), result(1)) == [LOADED, result(0, 1), result(1, 2)]


def test_sizes_and_times_of_the_ranks_are_merged() -> None:
    ranks = Ranks(2)
    for command in (INSPECT, LOAD, LOAD):
        ranks.group.send(command)
    ranks.answer(0, replace(INSPECTED, num_bytes=70))
    assert ranks.answer(1, replace(INSPECTED, num_bytes=30, num_pages=3)) == [INSPECTED]
    ranks.answer(0, replace(LOADED, load_us=5, from_host=True), replace(LOADED, load_us=7))
    events = ranks.answer(1, replace(LOADED, load_us=9), replace(LOADED, load_us=2))
    assert events == [replace(LOADED, load_us=9), replace(LOADED, load_us=7)]


def test_equal_commands_are_answered_in_order() -> None:
    ranks = Ranks(2)
    for _ in range(3):
        ranks.group.send(INSPECT)
    ranks.answer(0, replace(INSPECTED, error="first"), INSPECTED, INSPECTED)
    events = ranks.answer(1, INSPECTED, replace(INSPECTED, error="second"), INSPECTED)
    assert [event.error for event in events] == ["worker 0: first", "worker 1: second", ""]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_any_rank_is_the_answer(failing: int) -> None:
    ranks = Ranks(2)
    ranks.group.send(INSPECT)
    ranks.group.send(LOAD)
    ranks.answer(failing, replace(INSPECTED, error="no"), replace(LOADED, error="no", load_us=3))
    events = ranks.answer(1 - failing, INSPECTED, replace(LOADED, load_us=5, from_host=True))
    text = f"worker {failing}: no"
    assert events == [
        replace(INSPECTED, error=text), replace(LOADED, error=text, load_us=5)
    ]  # fmt: skip
    assert ranks.commands_of(1 - failing)[2:] == [UnloadAdapter(3)]  # the load that succeeded
    assert ranks.commands_of(failing)[2:] == []


@pytest.mark.parametrize("command", [INSPECT, LOAD])
@pytest.mark.parametrize("is_lasting", [False, True])
def test_a_passing_failure_is_passed_on_unless_another_rank_has_a_lasting_one(
    command: InspectAdapter | LoadAdapter, is_lasting: bool
) -> None:
    ranks, answer = Ranks(2), INSPECTED if command is INSPECT else LOADED
    ranks.group.send(command)
    assert ranks.answer(0, replace(answer, error="no memory", is_transient=True)) == []
    events = ranks.answer(1, replace(answer, error="damaged") if is_lasting else answer)
    text = "worker 1: damaged" if is_lasting else "worker 0: no memory"
    assert events == [replace(answer, error=text, is_transient=not is_lasting)]


@pytest.mark.parametrize("change", [{"content_hash": "other"}, {"max_rank": 9}, {"modules": []}])
def test_ranks_that_read_different_files_are_an_error(change: dict[str, Any]) -> None:
    ranks = Ranks(2)
    ranks.group.send(INSPECT)
    ranks.answer(0, INSPECTED)
    (event,) = ranks.answer(1, replace(INSPECTED, **change))
    assert event.content_hash == "" and "the worker ranks read different files at /a" in event.error


@pytest.mark.parametrize(
    ("command", "answers"),
    [
        (plan(0), [result(0), result(0)]),  # twice
        (plan(0), [result(1)]),
        (INSPECT, [INSPECTED, INSPECTED]),
        (INSPECT, [replace(INSPECTED, path="/b")]),
        (LOAD, [LOADED, LOADED]),
        (LOAD, [replace(LOADED, adapter_slot=4)]),
        (LOAD, [replace(LOADED, content_hash="other")]),
        (UnloadAdapter(3), [LOADED]),
        (INSPECT, [INSPECT]),
    ],
)
def test_answers_that_nothing_asks_for_name_the_rank(command: Any, answers: list[Any]) -> None:
    ranks = Ranks(2)
    ranks.group.send(command)
    with pytest.raises(ValueError, match="worker 1 sent"):
        ranks.answer(1, *answers)


def test_a_stranger_is_refused() -> None:
    ranks = Ranks(2)
    with pytest.raises(ValueError, match="b'worker-2' is no worker rank"):
        ranks.answer(2, result(0))


def test_an_adapter_is_in_host_memory_while_all_ranks_have_it() -> None:
    ranks = Ranks(2)
    evicted = AdapterEvicted("hash")
    assert ranks.answer(1, evicted) == [evicted]
    assert ranks.answer(0, evicted) == []  # known already
    ranks.group.send(LOAD)
    assert ranks.answer(0, LOADED) == []
    assert ranks.answer(0, evicted) == [evicted]
    # Rank 0 has lost it again by the time rank 1 has it.
    assert ranks.answer(1, LOADED) == [LOADED, evicted]
    ranks.group.send(LOAD)
    assert ranks.answer(0, LOADED) == []
    assert ranks.answer(1, LOADED) == [LOADED]
    assert ranks.answer(1, evicted) == [evicted]


def ready(rank: int, **changes: Any) -> WorkerReady:
    worker = FakeEngineWorker(fake_config(), rank, wakeup=lambda: None)
    return replace(worker.ready, **{"base_fingerprint": "base", **changes})


def test_the_group_is_ready_with_its_last_rank() -> None:
    ranks = Ranks(2)
    assert ranks.answer(1, ready(1)) == [] and not ranks.group.is_ready
    assert ranks.answer(0, ready(0)) == [] and ranks.group.is_ready
    assert ranks.group.ready == {0: ready(0), 1: ready(1)}
    with pytest.raises(ValueError, match="worker 0 sent the handshake"):
        ranks.answer(0, ready(0))


def test_the_handshakes_are_merged() -> None:
    merged = merge_ready([
        ready(0, num_pages=40, max_model_len=300, load_seconds=1.0),
        ready(1, num_pages=30, max_model_len=400, load_seconds=2.0),
    ])  # fmt: skip
    assert (merged.num_pages, merged.max_model_len) == (30, 300)
    assert merged.load_seconds == 2.0
    assert merge_ready([ready(0)]) == ready(0)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 2},
        {"vocab_size": 9},
        {"base_fingerprint": "x"},
        {"eos_token_ids": int_array([7])},
    ],
)
def test_ranks_of_different_models_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=f"worker 0 and worker 1 .* {name} is"):
        merge_ready([ready(0), ready(1, **change)])


def test_a_rank_that_left_is_an_error() -> None:
    class Gone(Ranks):
        def send_encoded(self, data: bytes, peer: bytes) -> None:
            raise PeerGoneError("worker-0 left")

    with pytest.raises(PeerGoneError):
        Gone(2).group.send(INSPECT)


def test_each_rank_has_a_worker_process_and_one_process_has_one_rank() -> None:
    config = fake_config(parallel=ParallelConfig(tensor_parallel_size=2))
    names = [spec.name for spec in engine_processes(config)]
    assert names == ["worker 0", "worker 1", "scheduler", "frontend 0"]
    with pytest.raises(ConfigError, match="must be 1 for an engine in this process"):
        InProcessEngine(config, worker=FakeEngineWorker)
