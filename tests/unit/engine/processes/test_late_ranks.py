"""A scheduler and a group of worker ranks that answer at different times, late, or never.

Page counts are checked after every operation, and every page that a rank reads or writes.
"""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from loraplex.scheduler.request import RequestRefused
from loraplex.scheduler.worker_protocol import LoadAdapter

from helpers.scheduling.group_harness import GroupHarness

NAMES = "abc"
MAX_STEPS_IN_FLIGHT = 3
CONTENTS = {"red": 1, "green": 2, "blue": 3, "huge": 9}  # content -> pages


def commands_of(harness: GroupHarness, rank: int, kind: type) -> list[Any]:
    return [command for command in harness.ranks[rank].commands if isinstance(command, kind)]


def inspected(harness: GroupHarness, name: str = "a") -> None:
    """Add a request of an adapter and let all ranks inspect it; its load is not executed."""
    harness.add("r", [1, 2, 3], adapter=name)
    harness.plan_all()
    for rank in range(2):
        harness.ranks[rank].work()
        harness.answer(rank)
    harness.plan_all()
    assert all(commands_of(harness, rank, LoadAdapter) for rank in range(2))


def test_a_load_that_one_rank_fails_early_and_another_ends_late() -> None:
    harness = GroupHarness()
    harness.register("a", "red", 2)
    harness.register("b", "green")
    path = harness.listed()["a"]["path"]
    inspected(harness)
    harness.break_file(path, 0, "it is gone")
    harness.add("base", [4, 5])
    harness.run_rank(0)
    assert harness.expected["r"].end is None  # rank 1 may still write to the pages
    assert harness.expected["base"].end is None
    pages = harness.scheduler.stats()["pages_adapter"]
    assert pages == 2
    harness.run_rank(1)
    assert harness.error_of("r") == (
        "adapter", f"adapter 'a' at {path} cannot be served: worker 0: it is gone"
    )  # fmt: skip
    assert harness.scheduler.stats()["pages_adapter"] == 0
    assert not harness.ranks[1].worker.adapters  # the group had this rank unload it
    harness.add("next", [7], adapter="b")  # takes the same slot and pages
    harness.run()


def test_an_adapter_unloaded_before_a_rank_has_it() -> None:
    """Its request keeps it; the pages are freed after that."""
    harness = GroupHarness()
    harness.register("a", "red", 2)
    inspected(harness)
    harness.run_rank(0)
    harness.scheduler.unload_adapter("a")
    harness.verify()
    assert harness.try_add("late", [1], adapter="a") == "unknown_adapter"
    harness.plan_all()
    harness.run_rank(0)
    assert not harness.expected["r"].token_ids
    harness.run()
    assert harness.expected["r"].end is not None
    assert not harness.resident()


def test_a_request_cancelled_while_a_rank_loads() -> None:
    harness = GroupHarness()
    harness.register("a", "red", 2)
    inspected(harness)
    harness.run_rank(1)
    harness.abort("r")
    harness.scheduler.unload_adapter("a")
    harness.plan_all()
    assert harness.scheduler.stats()["pages_adapter"] == 2  # rank 0 has still to write to them
    harness.run()
    assert not harness.resident()


def test_an_adapter_replaced_while_a_rank_loads() -> None:
    """The first request keeps the first content, and the next gets the second."""
    harness = GroupHarness()
    harness.register("a", "red", 2)
    inspected(harness)
    harness.run_rank(1)
    harness.register("a", "green", 3)
    harness.add("s", [1, 2, 3], adapter="a")
    harness.plan_all()
    harness.run_rank(1)
    assert not harness.expected["r"].token_ids and not harness.expected["s"].token_ids
    harness.run()  # compares the tokens with each content's
    for name in "rs":
        end = harness.expected[name].end
        assert end is not None and end.finish_reason == "length"


def test_a_rank_that_never_answers_holds_everything_and_loses_nothing() -> None:
    harness = GroupHarness(max_steps_in_flight=2)
    harness.register("a", "red", 2)
    inspected(harness)
    for i in range(4):
        harness.add(i, [i, 5])
    for _ in range(20):
        harness.now += 1
        harness.plan_all()
        harness.run_rank(0)
    assert len(harness.plans) == 2  # no more than the limit
    assert all(not e.token_ids and e.end is None for e in harness.expected.values())
    harness.abort(2)
    assert harness.scheduler.num_unfinished == 4
    harness.run()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_answer_that_got_lost_names_the_rank(rank: int) -> None:
    """The rank answers the next step; the one before would never end."""
    harness = GroupHarness(max_steps_in_flight=2)
    harness.add(0, [1, 2, 3])
    harness.plan_all()
    harness.run_rank(1 - rank)
    for _ in range(2):
        harness.ranks[rank].work()
    _, second = harness.ranks[rank].results
    with pytest.raises(ValueError, match=f"worker {rank} sent the result of step 1 before .* 0"):
        harness.send(rank, second)


class Traffic:
    """Actions of clients, files and ranks; `rng` makes every choice.

    Attributes:
        silent: a rank that neither works nor answers.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.silent: int | None = None
        self.harness = GroupHarness(
            num_ranks=rng.choice([2, 2, 3]),
            max_host=rng.choice([0, 1, 2, 10]),
            num_pages=rng.randint(12, 40),
            block_tokens=rng.choice([1, 2, 4]),
            max_num_seqs=4,
            max_num_batched_tokens=rng.choice([4, 9, 40]),
            max_steps_in_flight=rng.randint(1, MAX_STEPS_IN_FLIGHT),
            max_adapter_slots=rng.randint(1, 3),
            max_model_len=24,
        )
        for name in NAMES:
            self.register(name)

    @property
    def random_rank(self) -> int:
        return self.rng.choice([i for i in range(len(self.harness.ranks)) if i != self.silent])

    def run(self, num_actions: int) -> None:
        weights = {
            self.work: 14, self.answer: 12, self.plan: 8, self.add: 4, self.abort: 0.5,
            self.replace: 0.4, self.unload: 0.3, self.break_file: 0.2,
        }  # fmt: skip
        for action in self.rng.choices(list(weights), list(weights.values()), k=num_actions):
            action()

    def register(self, name: str) -> None:
        content = self.rng.choice(list(CONTENTS))
        self.harness.register(name, content, CONTENTS[content])

    def replace(self) -> None:
        self.register(self.rng.choice(NAMES))

    def unload(self) -> None:
        try:
            self.harness.scheduler.unload_adapter(self.rng.choice(NAMES))
        except RequestRefused as refusal:
            assert refusal.code == "unknown_adapter"
        self.harness.verify()

    def break_file(self) -> None:
        """One rank alone cannot read a file from now on."""
        path = self.rng.choice(sorted(self.harness.files))
        self.harness.break_file(path, self.random_rank, "it is gone")

    def add(self) -> None:
        prompt = [self.rng.randrange(2) for _ in range(self.rng.randint(1, 12))]
        adapter = self.rng.choice(["", *NAMES, *NAMES])
        number = len(self.harness.expected)
        code = self.harness.try_add(
            number, prompt, adapter=adapter, max_tokens=self.rng.randint(1, 9)
        )
        assert code in ("", "unknown_adapter", "adapter", "bad_request")

    def abort(self) -> None:
        if self.harness.expected:
            self.harness.abort(self.rng.choice(list(self.harness.expected)))

    def plan(self) -> None:
        self.harness.now += self.rng.random()
        self.harness.plan()

    def work(self) -> None:
        """A rank may be any number of commands behind the others."""
        rank = self.harness.ranks[self.random_rank]
        if rank.commands:
            rank.work()

    def answer(self) -> None:
        """A rank may keep an answer for any time. Answers to loads may overtake each other."""
        rank = self.random_rank
        sender = self.harness.ranks[rank]
        index = self.rng.choice([*sender.sendable(), len(sender.answers)])
        self.harness.answer(rank, index)

    def finish(self) -> None:
        self.harness.run()
        for expectation in self.harness.expected.values():
            end = expectation.end
            assert end is None or end.error_code in ("", "adapter", "bad_request"), end


SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(8, 200))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_traffic(seed: int) -> None:
    traffic = Traffic(random.Random(seed))
    traffic.run(400)
    traffic.finish()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_falls_silent_amid_random_traffic(seed: int) -> None:
    """No step, load or unload ends without it, whatever clients do and however often the others
    answer; its pages stay its own. When it goes on, everything ends as it should."""
    traffic = Traffic(random.Random(seed))
    harness = traffic.harness
    traffic.run(150)
    traffic.silent = traffic.random_rank
    rank = harness.ranks[traffic.silent]
    num_answered = len(rank.steps) - len(rank.results)
    held = {slot: content for slot, (content, _) in rank.worker.adapters.items()}
    for _ in range(25):
        traffic.run(10)
        assert len(harness.plans) <= num_answered + MAX_STEPS_IN_FLIGHT
        for info in harness.list_resident():
            if info["residency"] != "loading":
                assert held[info["adapter_slot"]] == info["content_hash"]
    traffic.silent = None
    traffic.finish()


def test_random_traffic_provokes_what_it_should() -> None:
    totals: dict[str, int] = {}
    for seed in range(1000, 1012):
        traffic = Traffic(random.Random(seed))
        traffic.harness.check = False
        actions = [traffic.add, traffic.plan, *[traffic.work, traffic.answer] * 3]
        for _ in range(60):
            for action in actions:
                action()
            if traffic.rng.random() < 0.1:
                traffic.break_file()
        traffic.finish()
        stats = traffic.harness.scheduler.stats()
        for key, value in (stats | stats["finished"]).items():
            if isinstance(value, int):
                totals[key] = totals.get(key, 0) + value
    for key in ("num_preemptions", "num_adapter_loads", "num_adapter_unloads", "length", "error",
                "num_adapter_load_failures", "prefix_hit_tokens"):  # fmt: skip
        assert totals[key] > 0, f"no {key}"


class GroupMachine(RuleBasedStateMachine):
    """The same traffic in an order that hypothesis chooses, so that failures shrink."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.traffic = Traffic(random.Random(seed))

    @rule(name=st.sampled_from(["add", "abort", "plan", "replace", "unload", "break_file"]))
    def client(self, name: str) -> None:
        getattr(self.traffic, name)()

    @rule(times=st.integers(1, 12))
    def work(self, times: int) -> None:
        for _ in range(times):
            self.traffic.work()

    @rule(times=st.integers(1, 12))
    def answer(self, times: int) -> None:
        for _ in range(times):
            self.traffic.answer()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.finish()


SETTINGS = settings(
    max_examples=8,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

TestGroupMachine = GroupMachine.TestCase
TestGroupMachine.settings = SETTINGS


@pytest.mark.long
class TestLongGroupMachine(GroupMachine.TestCase):
    settings = settings(SETTINGS, max_examples=100)
