from array import array
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig
from loraplex.engine.ipc.channel import InprocChannel, PeerGoneError, SlowPeerError, worker_identity
from loraplex.engine.ipc.messages.frontend import (
    AbortRequests,
    AdapterCommand,
    AdapterReply,
    EngineInfo,
    FrontendHello,
    ReplyRows,
    ReportLoad,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.processes.scheduler_loop import SchedulerLoop
from loraplex.engine.processes.scheduler_main import engine_info, make_scheduler
from loraplex.engine.processes.worker_group import WorkerGroup
from loraplex.scheduler.adapters.manager import ROWS_PER_SLICE
from loraplex.scheduler.frontend_protocol import (
    AdapterSource,
    AddRequest,
    SequenceOutput,
    StepOutputs,
)
from loraplex.scheduler.placement.engine_report import EngineReport
from loraplex.scheduler.worker_protocol import StepPlan

from helpers.fakes.fake_engine import (
    FakeEngineWorker,
    expected_tokens,
    fake_config,
    make_fake_adapter,
)
from helpers.fakes.fake_model import sampling_spec

MESSAGES_PER_TURN = 10

ONE, TWO = b"frontend-0", b"frontend-1"


class Frontends:
    """The scheduler's end towards two frontends, held in the test's hands."""

    def __init__(self) -> None:
        self.inbox: deque[tuple[bytes, Any]] = deque()
        self.sent: list[tuple[bytes, Any]] = []
        self.error: Exception | None = None

    def send(self, message: object, peer: bytes = b"") -> None:
        if self.error is not None:
            raise self.error
        self.sent.append((peer, message))

    def receive(self, limit: int) -> list[tuple[bytes, Any]]:
        return [self.inbox.popleft() for _ in range(min(limit, len(self.inbox)))]

    def outputs_of(self, peer: bytes) -> list[SequenceOutput]:
        steps = [m for p, m in self.sent if p == peer and isinstance(m, StepOutputs)]
        return [output for step in steps for output in step]

    def tokens_of(self, peer: bytes, request_id: int) -> list[int]:
        outputs = [o for o in self.outputs_of(peer) if o.request_id == request_id]
        return [token for output in outputs for token in output.token_ids]


class Bench:
    """A loop with the real scheduler, a fake worker, and two frontends."""

    def __init__(self, **parts: Any) -> None:
        config = fake_config(**parts)
        self.worker = FakeEngineWorker(config, 0, wakeup=lambda: None)
        self.frontends = Frontends()
        workers, self.worker_end = InprocChannel.pair(worker_identity(0))
        info = engine_info(config, [self.worker.ready])
        self.scheduler = make_scheduler(config, info)
        self.loop = SchedulerLoop(
            self.scheduler,
            info=info,
            frontends=self.frontends,
            workers=WorkerGroup(workers, 1),
            messages_per_turn=MESSAGES_PER_TURN,
        )
        self.plans: list[StepPlan] = []

    def turn(self, *, work: bool = True) -> bool:
        has_more = self.loop.turn()
        self.scheduler.check_integrity()
        if not work:
            return has_more
        for _, command in self.worker_end.receive():
            if isinstance(command, StepPlan):
                self.plans.append(command)
            self.worker.handle(command)
        for event in self.worker.events():
            self.worker_end.send(event)
        return has_more

    def finish(self) -> None:
        for _ in range(500):
            self.turn()
            if not self.scheduler.num_unfinished and not self.scheduler.stats()["steps_in_flight"]:
                self.turn()
                return
        raise AssertionError("requests did not end")

    def ask(self, peer: bytes, request_id: int, prompt: list[int], **values: Any) -> None:
        spec = sampling_spec(max_tokens=values.pop("max_tokens", 6))
        message = AddRequest(request_id, array("i", prompt), spec, **values)
        self.frontends.inbox.append((peer, message))


def test_two_frontends_may_use_the_same_ids() -> None:
    bench = Bench()
    bench.ask(ONE, 1, [5, 6])
    bench.ask(TWO, 1, [7, 8])
    bench.finish()
    assert bench.frontends.tokens_of(ONE, 1) == expected_tokens([5, 6], max_tokens=6)
    assert bench.frontends.tokens_of(TWO, 1) == expected_tokens([7, 8], max_tokens=6)
    assert [o.finish_reason for o in bench.frontends.outputs_of(ONE)][-1] == "length"


def test_a_step_brings_each_frontend_one_message() -> None:
    bench = Bench()
    for i in range(10):
        bench.ask(ONE, i, [5, i])
    bench.finish()
    steps = [m for _, m in bench.frontends.sent if isinstance(m, StepOutputs)]
    assert len(steps) <= 6
    assert all(len(list(step)) == 10 for step in steps)


def test_plans_go_out_ahead_of_results() -> None:
    bench = Bench()
    bench.ask(ONE, 1, [5, 6])
    assert not bench.turn(work=False)
    commands = [m for _, m in bench.worker_end.receive()]
    assert [type(m) for m in commands] == [StepPlan, StepPlan]
    bench.turn(work=False)
    assert not bench.worker_end.receive()  # no more than the limit, and no busy plans


def test_an_abort_ends_only_its_own_and_frees_the_pages() -> None:
    bench = Bench()
    bench.ask(ONE, 1, [5, 6], max_tokens=100)
    bench.ask(TWO, 1, [7, 8])
    bench.turn()
    bench.frontends.inbox.append((ONE, AbortRequests(array("q", [1, 99]))))
    bench.finish()
    assert len(bench.frontends.tokens_of(ONE, 1)) < 100
    assert bench.frontends.tokens_of(TWO, 1) == expected_tokens([7, 8], max_tokens=6)
    assert bench.scheduler.stats()["pages_kv"] == 0


def test_what_the_scheduler_refuses_comes_back_as_an_error() -> None:
    bench = Bench()
    bench.ask(ONE, 1, [5], adapter="nobody")
    bench.ask(ONE, 2, [5] * 600)
    bench.turn()
    first, second = bench.frontends.outputs_of(ONE)
    assert (first.finish_reason, first.error_code) == ("error", "unknown_adapter")
    assert "nobody" in first.error
    assert (second.request_id, second.error_code) == (2, "bad_request")


def test_hello_and_stats_are_answered() -> None:
    bench = Bench()
    bench.frontends.inbox += [(ONE, FrontendHello("frontend 0")), (TWO, StatsQuery(8))]
    bench.turn()
    (one, info), (two, stats) = bench.frontends.sent
    assert one == ONE
    assert isinstance(info, EngineInfo)
    assert info.num_pages == 400
    assert two == TWO
    assert isinstance(stats, StatsReply)
    assert (stats.query_id, stats.stats["running"]) == (8, 0)


def test_adapter_commands(tmp_path: Path) -> None:
    pirate = make_fake_adapter(tmp_path / "pirate", "arr")
    mute = make_fake_adapter(tmp_path / "mute", "...")
    bench = Bench(adapter=AdapterConfig(adapters=(("mute", str(mute)),)))

    def run(op: str, name: str = "", path: Path | str = "") -> AdapterReply:
        bench.frontends.sent.clear()
        bench.frontends.inbox.append(
            (ONE, AdapterCommand(3, op, name, AdapterSource.at(str(path))))
        )
        for _ in range(4):
            bench.turn()
        *parts, (peer, reply) = bench.frontends.sent
        assert peer == ONE
        assert isinstance(reply, AdapterReply)
        assert reply.command_id == 3
        rows = [row for _, part in parts for row in part.rows]
        return AdapterReply(3, reply.error, reply.error_code, [*rows, *reply.adapters])

    assert [a["name"] for a in run("list").adapters] == ["mute"]
    assert run("load", "pirate", pirate).adapters[0]["num_pages"] == 3
    assert run("pin", "pirate").adapters[0]["pinned"]
    assert [(a["name"], a["tier"]) for a in run("list", "pirate").adapters] == [("pirate", "pages")]
    assert not run("unpin", "pirate").adapters[0]["pinned"]
    for op in ("pin", "unpin", "list"):
        assert run(op, "nobody").error_code == "unknown_adapter"
    assert run("register", "later", tmp_path / "nowhere").error == ""
    failed = run("load", "bad", tmp_path / "nowhere")
    assert (failed.error_code, "nowhere" in failed.error) == ("adapter", True)
    assert run("unload", "pirate").adapters[0]["name"] == "pirate"
    assert run("unload", "pirate").error_code == "unknown_adapter"
    assert run("explode").error_code == "bad_request"


def test_an_adapter_that_fails_on_first_use_fails_its_requests(tmp_path: Path) -> None:
    bench = Bench()
    bench.frontends.inbox.append(
        (ONE, AdapterCommand(1, "register", "x", AdapterSource.at(str(tmp_path))))
    )
    bench.ask(ONE, 1, [5], adapter="x")
    bench.ask(ONE, 2, [5])
    bench.finish()
    errors = [o for o in bench.frontends.outputs_of(ONE) if o.finish_reason == "error"]
    assert [(o.request_id, o.error_code) for o in errors] == [(1, "adapter")]
    assert bench.frontends.tokens_of(ONE, 2) == expected_tokens([5], max_tokens=6)


def test_a_frontend_that_left_does_not_end_the_scheduler() -> None:
    bench = Bench()
    bench.ask(ONE, 1, [5])
    bench.frontends.error = PeerGoneError("gone")
    bench.finish()
    bench.frontends.error = SlowPeerError("does not read")
    bench.ask(ONE, 1, [5])
    with pytest.raises(SlowPeerError):
        bench.finish()


def test_requests_of_a_frontend_that_left_are_aborted_at_its_next_output() -> None:
    bench = Bench()
    for i in range(3):
        bench.ask(ONE, i, [5, i], max_tokens=400)
    bench.turn()
    assert bench.scheduler.num_unfinished == 3
    bench.frontends.error = PeerGoneError("gone")
    bench.turn()
    assert bench.scheduler.num_unfinished == 0
    bench.finish()
    assert bench.scheduler.stats()["pages_kv"] == 0


def test_a_restarted_frontend_ends_the_requests_of_its_former_self() -> None:
    """Also those that wait and have no output to fail on; another frontend keeps its own."""
    bench = Bench()
    again = b"frontend-0.1"
    bench.frontends.inbox += [(ONE, FrontendHello("a")), (TWO, FrontendHello("b"))]
    for i in range(80):  # more than run at a time
        bench.ask(ONE, i, [5, i], max_tokens=400)
    bench.ask(TWO, 1, [7, 8])
    while bench.frontends.inbox:
        bench.turn(work=False)
    assert bench.scheduler.num_unfinished == 81
    bench.frontends.inbox.append((again, FrontendHello("a")))
    bench.ask(again, 1, [5, 6])
    bench.turn()
    assert bench.scheduler.num_unfinished == 2
    bench.finish()
    assert bench.frontends.tokens_of(again, 1) == expected_tokens([5, 6], max_tokens=6)
    assert bench.frontends.tokens_of(TWO, 1) == expected_tokens([7, 8], max_tokens=6)


@pytest.mark.parametrize(
    "message", [EngineInfo(1, 1, 1, 1, 1, []), StepOutputs(array("q"), array("i"))]
)
def test_a_message_from_the_wrong_side_is_a_fault(message: object) -> None:
    bench = Bench()
    bench.frontends.inbox.append((ONE, message))
    with pytest.raises(TypeError, match="a frontend sent"):
        bench.turn()


def test_a_burst_is_taken_in_over_several_turns_with_steps_between() -> None:
    bench = Bench()
    bench.ask(ONE, 0, [5], max_tokens=200)
    bench.turn()
    for i in range(1, 36):
        bench.ask(ONE, i, [5, i], max_tokens=2)
    bench.frontends.inbox.append((ONE, AbortRequests(array("q", [35]))))
    left, planned = [], []
    for _ in range(4):
        num_plans = len(bench.plans)
        has_more = bench.turn()
        left.append((len(bench.frontends.inbox), has_more))
        planned.append(len(bench.plans) > num_plans)
    assert left == [(26, True), (16, True), (6, True), (0, False)]
    assert all(planned)
    bench.finish()
    for i in range(1, 35):
        assert bench.frontends.tokens_of(ONE, i) == expected_tokens([5, i], max_tokens=2)
    assert bench.frontends.tokens_of(ONE, 35) == []  # its abort came after it, not before


def test_a_long_list_and_stats_come_in_parts_with_steps_between(tmp_path: Path) -> None:
    bench = Bench()
    names = [f"a{i:03}" for i in range(3 * ROWS_PER_SLICE + 1)]
    for name in names:
        bench.scheduler.register_adapter(name, AdapterSource.at(str(tmp_path / name)))
    bench.ask(ONE, 0, [5], max_tokens=200)
    bench.turn()
    bench.frontends.sent.clear()
    bench.frontends.inbox += [(ONE, AdapterCommand(7, "list")), (TWO, StatsQuery(8))]
    num_turns = 0
    while bench.turn():
        num_turns += 1
        if num_turns == 2:
            bench.scheduler.unload_adapter(names[-1])
            bench.scheduler.unload_adapter(names[0])
            bench.scheduler.register_adapter("new", AdapterSource.at(str(tmp_path / "new")))
    sent = [(p, m) for p, m in bench.frontends.sent if not isinstance(m, StepOutputs)]
    parts = [m for _, m in sent if isinstance(m, ReplyRows)]
    assert all(len(part.rows) <= ROWS_PER_SLICE for part in parts)
    assert [row["name"] for part in parts for row in part.rows] == names[:-1]
    assert isinstance(sent[-1][1], AdapterReply)  # the last message with this id
    assert [p for p, m in sent if isinstance(m, StatsReply)] == [TWO]
    assert len(bench.frontends.tokens_of(ONE, 0)) >= num_turns - 1  # no turn was without its step


def test_a_router_gets_reports_until_it_leaves() -> None:
    bench = Bench()
    bench.frontends.inbox.append((ONE, ReportLoad()))
    bench.turn()
    ((peer, report),) = bench.frontends.sent
    assert (peer, report.num_received, report.running) == (ONE, 0, 0)
    assert isinstance(report, EngineReport) and report.max_running == 64
    assert bench.loop.due_s is not None
    bench.frontends.error = PeerGoneError("it left")
    bench.ask(ONE, 1, [5, 6])
    bench.finish()
    assert bench.loop.due_s is None
