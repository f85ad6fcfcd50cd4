"""Random traffic over tiny pools: every request ends once, with the tokens of the oracle.

The harness checks the scheduler's integrity after every operation. The fake worker checks every
page that a step reads or writes.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused

from helpers.scheduling.scheduler_harness import Harness

NAMES = "abcd"
TENANTS = ["", "", "ann", "ben"]
CONTENTS = {"red": 1, "green": 2, "blue": 3, "huge": 12}  # content -> pages


POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {"max_wait_s": 20.0},
    "priority": {"max_wait_s": 5.0},
    "cluster": {"max_adapters_per_batch": 2, "max_wait_s": 15.0},
    "abort": {"ttft_slo_s": 12.0},
    "vtc": {"max_wait_s": 30.0, "fair_share_weights": (("tenant", "2.5"),)},
}


def random_harness(rng: random.Random, policy: str) -> Harness:
    max_num_seqs = rng.randint(1, 6)
    options = {"policy": policy, **POLICIES[policy], "max_adapters_per_tenant": 2}
    if policy == "vtc":
        options["fair_share_by"] = rng.choice(["tenant", "adapter"])
    return Harness(
        policy=options,
        num_pages=rng.randint(8, 40),
        block_tokens=rng.choice([1, 2, 4]),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 60]),
        max_steps_in_flight=rng.randint(1, 3),
        max_adapter_slots=rng.randint(1, 4),
        max_model_len=rng.choice([24, 48]),
        max_queue_len=rng.choice([3, 100]),
        enable_prefix_caching=rng.random() < 0.8,
    )


class Traffic:
    """Actions of clients, files and the engine; `rng` makes every choice."""

    def __init__(self, rng: random.Random, policy: str = "fcfs") -> None:
        self.rng = rng
        self.harness = random_harness(rng, policy)
        self.num_loads = 0
        for name in NAMES:
            self.register(name)

    def new_path(self) -> str:
        """A file of one of few contents; now and then one that cannot be read, or not twice."""
        path = f"/{len(self.harness.files)}"
        content = self.rng.choice(list(CONTENTS))
        error = "broken file" if self.rng.random() < 0.15 else ""
        invocation = self.rng.choice([(), (), (1,), (0, 1)])
        self.harness.file(path, content, CONTENTS[content], error, invocation=invocation)
        return path

    def register(self, name: str, tenant: str = "") -> None:
        source = AdapterSource.at(self.new_path())
        self.change(self.harness.scheduler.register_adapter, name, source, tenant)

    def load(self) -> None:
        name, source = self.rng.choice(NAMES), AdapterSource.at(self.new_path())
        load, key = self.harness.scheduler.load_adapter, self.num_loads + 1
        self.num_loads += self.change(load, name, source, key, self.rng.choice(TENANTS))

    def unload(self) -> None:
        unload = self.harness.scheduler.unload_adapter
        self.change(unload, self.rng.choice(NAMES), self.rng.choice(TENANTS))

    def change(self, command: Callable[..., object], *arguments: object) -> bool:
        """Run a command of a tenant. Returns whether the scheduler accepted it."""
        try:
            command(*arguments)
        except RequestRefused as refusal:
            assert refusal.code in ("unknown_adapter", "forbidden", "too_many_adapters")
            return False
        finally:
            self.harness.verify()
        return True

    def break_file(self) -> None:
        """From now on a file that was read before is not there; its requests may fail."""
        path = self.rng.choice(sorted(self.harness.files))
        self.harness.files[path].error = "it is gone"
        self.harness.files[path].is_transient = False

    def trouble_file(self) -> None:
        """A file cannot be read for a passing reason, or all such trouble is over."""
        if self.rng.random() < 0.4:
            for file in self.harness.files.values():
                if file.is_transient:
                    file.error, file.is_transient = "", False
            return
        file = self.harness.files[self.rng.choice(sorted(self.harness.files))]
        if not file.error:
            file.error, file.is_transient = "too many open files", True

    def add(self) -> None:
        rng = self.rng
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 16))]  # so that prefixes meet
        options: dict[str, Any] = {
            "salt": rng.choice(["", "", "tenant"]),
            "tenant": rng.choice(TENANTS),
            "client": rng.choice([b"", b"1", b"2"]),
            "priority": rng.choice([0, 0, 0, 1]),
            "use_prefix_cache": rng.random() < 0.9,
            "max_tokens": rng.randint(1, 24),
            "min_tokens": rng.choice([0, 0, 2]),
            "stop_token_ids": rng.choice([(), (3, 4, 5)]),
            "num_logprobs": rng.choice([-1, -1, 0]),
            "num_prompt_logprobs": rng.choice([-1, -1, 0]),
            "num_resumed": rng.choice([0, 0, 0, 1, 5]),
        }
        if rng.random() < 0.3:
            names = rng.sample(NAMES, rng.randint(1, 3))
            options["mix"] = {name: rng.choice([1.0, 1.0, 0.5, -2.0]) for name in names}
        else:
            options["adapter"] = rng.choice(["", *NAMES])
        code = self.harness.try_add(len(self.harness.expected), prompt, **options)
        assert code in ("", "queue_full", "unknown_adapter", "adapter", "bad_request")

    def abort(self) -> None:
        if self.harness.expected:
            self.harness.abort(self.rng.choice(list(self.harness.expected)))

    def plan(self) -> None:
        self.harness.now += self.rng.random()
        self.harness.plan()

    def deliver(self) -> None:
        """Events overtake each other, as with loads of different sizes."""
        self.harness.send_commands()
        if self.harness.events:
            self.harness.events.rotate(self.rng.randrange(3))
            self.harness.deliver_event()

    def commit(self) -> None:
        if self.harness.results:
            self.harness.commit()

    def finish(self) -> None:
        self.harness.run()
        for end in (expectation.end for expectation in self.harness.expected.values()):
            assert end is None or end.error_code in ("", "adapter", "bad_request", "deadline"), end
        assert len(self.harness.adapter_updates) == self.num_loads


SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 30))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_random_traffic(policy: str, seed: int) -> None:
    traffic = Traffic(random.Random(seed), policy)
    weights = {
        traffic.plan: 12,
        traffic.commit: 8,
        traffic.deliver: 5,
        traffic.add: 5,
        traffic.abort: 0.7,
        traffic.load: 0.5,
        traffic.unload: 0.2,
        traffic.break_file: 0.1,
        traffic.trouble_file: 0.5,
        lambda: traffic.register(traffic.rng.choice(NAMES), traffic.rng.choice(TENANTS)): 0.3,
    }
    for action in traffic.rng.choices(list(weights), list(weights.values()), k=150):
        action()
    traffic.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_random_traffic_provokes_what_it_should(policy: str) -> None:
    """The traffic reaches the rare paths."""
    totals: dict[str, int] = {}
    for seed in range(12):
        traffic = Traffic(random.Random(1000 + seed), policy)
        traffic.harness.check = False
        for _ in range(40):
            traffic.add()
            traffic.plan()
            traffic.deliver()
            traffic.commit()
        traffic.finish()
        stats = traffic.harness.scheduler.stats()
        for key, value in (stats | stats["finished"]).items():
            if isinstance(value, int):
                totals[key] = totals.get(key, 0) + value
    for key in ("num_preemptions", "num_dropped_tokens", "prefix_hit_tokens", "num_refused",
                "num_adapter_loads", "num_adapter_prefetches", "num_adapter_unloads", "stop",
                "length", "error"):  # fmt: skip
        assert totals[key] > 0, f"no {key}"
    assert (totals["num_deadline_drops"] > 0) == (policy == "abort")


class SchedulerMachine(RuleBasedStateMachine):
    """The same traffic in an order that hypothesis chooses, so that failures shrink."""

    @initialize(seed=st.integers(0, 2**32), policy=st.sampled_from(list(POLICIES)))
    def begin(self, seed: int, policy: str) -> None:
        self.traffic = Traffic(random.Random(seed), policy)

    @rule()
    def add(self) -> None:
        self.traffic.add()

    @rule()
    def abort(self) -> None:
        self.traffic.abort()

    @rule()
    def plan(self) -> None:
        self.traffic.plan()

    @precondition(lambda self: self.traffic.harness.results)
    @rule()
    def commit(self) -> None:
        self.traffic.commit()

    @rule()
    def deliver(self) -> None:
        self.traffic.deliver()

    @rule()
    def load(self) -> None:
        self.traffic.load()

    @rule()
    def unload(self) -> None:
        self.traffic.unload()

    @rule()
    def trouble_file(self) -> None:
        self.traffic.trouble_file()

    @rule(name=st.sampled_from(NAMES), tenant=st.sampled_from(TENANTS))
    def register(self, name: str, tenant: str) -> None:
        self.traffic.register(name, tenant)

    @rule(num_turns=st.integers(1, 20))
    def run_on(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.traffic.harness.turn()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.finish()


SETTINGS = settings(
    max_examples=8,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = SETTINGS


@pytest.mark.long
class TestLongSchedulerMachine(SchedulerMachine.TestCase):
    settings = settings(SETTINGS, max_examples=100, stateful_step_count=50)
