"""A rank lives and never answers a load or an inspection: nobody waits for ever.

Its pages stay allocated, since the rank may still write them, and an answer that comes late counts.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.ipc.channel import InprocChannel, worker_identity
from loraplex.engine.ipc.messages.frontend import AdapterCommand, AdapterReply
from loraplex.engine.processes.adapter_deadlines import AdapterDeadlines
from loraplex.engine.processes.scheduler_loop import SchedulerLoop
from loraplex.engine.processes.scheduler_main import engine_info, make_scheduler
from loraplex.engine.processes.worker_group import WorkerGroup
from loraplex.scheduler.frontend_protocol import AdapterSource, AddRequest, StepOutputs
from loraplex.scheduler.worker_protocol import AdapterLoaded, int_array

from helpers.fakes.fake_engine import FakeEngineWorker, fake_config, make_fake_adapter
from helpers.fakes.fake_model import sampling_spec
from helpers.scheduling.group_harness import GroupHarness

ANSWER_S, HANG_S = 10, 30
SEEDS = [range(4), pytest.param(range(4, 80), marks=pytest.mark.long)]


def stuck_group() -> GroupHarness:
    """Returns a group whose rank 1 has not executed the load that request "r" waits for."""
    harness = GroupHarness(answer_s=ANSWER_S, hang_s=HANG_S)
    harness.register("a", "red", 2)
    harness.add("r", [1, 2, 3], adapter="a")
    harness.plan_all()
    for rank in range(2):
        harness.ranks[rank].work()
        harness.answer(rank)
    harness.plan_all()
    harness.run_rank(0)
    return harness


def assert_failed(harness: GroupHarness, request: str, verb: str) -> None:
    path = harness.listed()["a"]["path"]
    code, text = harness.error_of(request)
    assert code == "adapter"
    assert text == (
        f"adapter 'a' at {path} cannot be served now: "
        f"worker 1 has not finished {verb} it within {ANSWER_S} s"
    )


def test_requests_end_and_the_pages_stay_until_the_rank_answers() -> None:
    harness = stuck_group()
    harness.look(ANSWER_S - 1)
    assert harness.expected["r"].end is None
    harness.look()
    assert_failed(harness, "r", "loading")
    assert harness.scheduler.stats()["pages_adapter"] == 2
    harness.add("base", [4, 5])
    harness.add("next", [1, 2], adapter="a")
    harness.plan_all()
    harness.look()
    assert_failed(harness, "next", "loading")  # at the next look
    assert harness.expected["base"].end is None
    harness.run()  # the answer comes
    assert harness.scheduler.stats()["pages_adapter"] == 2
    harness.add("late", [1, 2], adapter="a")
    harness.run()
    assert harness.expected["late"].token_ids
    assert not harness.hung


def test_equal_adapters_under_several_names_fail_under_their_own() -> None:
    harness = stuck_group()
    harness.register("b", "red", 2)
    harness.add("s", [1], adapter="b")
    harness.plan_all()
    harness.ranks[1].commands.rotate(-1)  # its loads are stuck, its inspections are not
    harness.run_rank(0)
    harness.ranks[1].work()
    harness.answer(1)
    harness.plan_all()
    harness.look(ANSWER_S)
    assert_failed(harness, "r", "loading")
    assert harness.error_of("s")[1].startswith("adapter 'b' at /b/1 cannot be served now: worker 1")


def test_a_rank_that_stays_silent_hangs() -> None:
    harness = stuck_group()
    harness.look(HANG_S - 1)
    assert not harness.hung
    harness.look()
    path = harness.listed()["a"]["path"]
    assert harness.hung == {
        1: f"has not finished loading the adapter at {path} within {HANG_S} s, nor any that came "
        "later"
    }


def test_loads_and_pins_that_wait_for_an_inspection_are_answered() -> None:
    harness = GroupHarness(answer_s=ANSWER_S)
    harness.file("/a", "red", 2)
    source = AdapterSource.at("/a")
    harness.scheduler.load_adapter("a", source, "first")
    harness.scheduler.load_adapter("a", source, "second")  # is read after the first
    harness.scheduler.pin_adapter("a", "pin")
    harness.add("r", [1], adapter="a")
    harness.plan_all()
    harness.run_rank(0)
    harness.look(ANSWER_S)
    assert_failed(harness, "r", "reading")
    codes = {key: reply.error_code for key, reply in harness.adapter_updates.items()}
    assert codes == dict.fromkeys(["first", "second", "pin"], "adapter")
    assert "worker 1 has not finished reading it" in harness.adapter_updates["pin"].error
    harness.run()
    assert harness.listed()["a"]["state"] == "ready" and not harness.listed()["a"]["pinned"]


class Frontend:
    """The scheduler's end towards one frontend."""

    def __init__(self, *inbox: Any) -> None:
        self.inbox = [(b"frontend-0", message) for message in inbox]
        self.sent: list[Any] = []

    def send(self, message: object, peer: bytes = b"") -> None:
        self.sent.append(message)

    def receive(self, limit: int) -> list[tuple[bytes, Any]]:
        taken, self.inbox = self.inbox[:limit], self.inbox[limit:]
        return taken


def test_the_loop_fails_the_request_and_reports_the_rank(tmp_path: Path) -> None:
    path = str(make_fake_adapter(tmp_path / "a", "red"))
    config = fake_config()
    worker = FakeEngineWorker(config, 0, wakeup=lambda: None, keeps_loads=True)
    workers, worker_end = InprocChannel.pair(worker_identity(0))
    frontend = Frontend(
        AdapterCommand(1, "load", "a", AdapterSource.at(path)),
        AddRequest(5, int_array([1, 2]), sampling_spec(max_tokens=3), adapter="a"),
    )
    now = 0.0
    deadlines = AdapterDeadlines(1, answer_s=ANSWER_S, hang_s=HANG_S, clock=lambda: now)
    hung: list[tuple[int, str]] = []
    info = engine_info(config, [worker.ready])
    loop = SchedulerLoop(
        make_scheduler(config, info),
        info=info,
        frontends=frontend,
        workers=WorkerGroup(workers, 1, deadlines),
        on_hung_rank=lambda rank, how: hung.append((rank, how)),
    )
    assert loop.due_s is None
    for _ in range(HANG_S + 3):
        loop.turn()
        for _, command in worker_end.receive():
            worker.handle(command)
        for event in worker.events():
            worker_end.send(event)
        loop.turn()
        now += 1.0
        assert loop.due_s == 0.0  # a turn is due although no message comes
    (reply,) = (message for message in frontend.sent if isinstance(message, AdapterReply))
    assert not reply.error  # its files were read
    (output,) = (o for m in frontend.sent if isinstance(m, StepOutputs) for o in m)
    assert (output.request_id, output.error_code) == (5, "adapter")
    assert "worker 0 has not finished loading it within 10 s" in output.error
    assert hung[0] == (
        0, f"has not finished loading the adapter at {path} within 30 s, nor any that came later"
    )  # fmt: skip


def end_steps(harness: GroupHarness) -> None:
    """Let every rank execute all and send the results of its steps; it keeps other answers."""
    harness.send_commands()
    for number, rank in enumerate(harness.ranks):
        while rank.commands:
            rank.work()
        while rank.results:
            harness.answer(number, len(rank.answers))


def run_random_traffic(rng: random.Random) -> int:
    """Returns the number of requests that failed because an answer was overdue."""
    harness = GroupHarness(answer_s=4, num_pages=rng.randint(10, 30), max_adapter_slots=2)
    pages = {"red": 1, "green": 2, "blue": 3}
    for name in "abc":
        harness.register(name, *rng.choice(list(pages.items())))
    for number in range(150):
        match rng.choice(["add", "add", "plan", "plan", "work", "work", "look", "replace"]):
            case "add":
                harness.try_add(number, [rng.randrange(3)], adapter=rng.choice("abc"))
            case "plan":
                harness.plan()
            case "replace":
                harness.register(rng.choice("abc"), *rng.choice(list(pages.items())))
            case "look":
                harness.look(rng.randint(1, 3))
            case "work":
                harness.run_rank(rng.randrange(2))
    end_steps(harness)
    harness.look(20)
    assert not harness.scheduler.waiting.num_parked, "a request waits for an overdue answer"
    harness.run()
    ends = [expected.end.error for expected in harness.expected.values() if expected.end]
    return sum("has not finished" in text for text in ends)


@pytest.mark.parametrize("seeds", SEEDS)
def test_random_traffic_with_answers_that_come_late(seeds: range) -> None:
    """Requests fail while an answer is overdue; no page is lost, and late answers count."""
    assert sum(run_random_traffic(random.Random(seed)) for seed in seeds) > 0


def test_an_answer_that_was_given_up_is_taken_once() -> None:
    harness = stuck_group()
    harness.look(ANSWER_S)
    content_hash = harness.list_resident()[0]["content_hash"]
    harness.send(1, AdapterLoaded(0, content_hash))
    with pytest.raises(ValueError, match="worker 1 sent AdapterLoaded"):
        harness.send(1, AdapterLoaded(0, content_hash))
