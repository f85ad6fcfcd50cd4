"""The bounds that the policies promise, over random arrivals and against adversaries."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from loraplex.scheduler.policies.fair_share import VirtualTokenCounters
from loraplex.scheduler.request import Request, RequestState

from helpers.scheduling.scheduler_harness import Harness

MAX_WAIT_S = 8.0
SLO_S = 10.0
OPTIONS: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "priority": {},
    "cluster": {"max_adapters_per_batch": 1},
    "abort": {"ttft_slo_s": SLO_S},
    "vtc": {},
}


def harness_of(policy: str, *, max_wait_s: float = MAX_WAIT_S, **options: Any) -> Harness:
    own = {"policy": policy, "max_wait_s": max_wait_s, **OPTIONS[policy]}
    return Harness(policy=own, max_adapter_slots=8, **options)


class Witness:
    """Looks at the queue before and after each plan, and judges who went before whom."""

    def __init__(self, policy: str, harness: Harness) -> None:
        self.policy = policy
        self.harness = harness
        self.scheduler = harness.scheduler
        self.num_overtaken = 0
        self.passes_left: dict[Request, int] = {}  # of aged requests under fcfs

    def plan(self) -> None:
        waiting = list(self.scheduler.waiting.by_age)
        running = list(self.scheduler.running)
        unserved = self._unserved()
        self.harness.plan()
        left = set(self.scheduler.waiting.by_age)
        started_now = [r for r in waiting if r.admitted_at == self.harness.now and r not in left]
        resumed_late = [r for r in waiting if r in left and 0 <= r.admitted_at < self.harness.now]
        if self.policy in ("cluster", "abort", "vtc"):
            assert not (started_now and resumed_late), "a preempted request waits behind a new one"
        for started in started_now:
            for passed in waiting:
                if passed in left and passed.admitted_at < 0 and passed.order < started.order:
                    self.num_overtaken += 1
                    assert self.may_pass(started, passed, started_now, unserved)
        self.check_preempted(running)

    def _unserved(self) -> dict[str, float]:
        policy = self.scheduler._policy
        return dict(policy._unserved) if isinstance(policy, VirtualTokenCounters) else {}

    def may_pass(
        self,
        started: Request,
        passed: Request,
        started_now: list[Request],
        unserved: dict[str, float],
    ) -> bool:
        waited = self.harness.now - passed.arrival
        if self.policy == "fcfs" and waited >= MAX_WAIT_S:
            older = [r for r in self.scheduler.waiting.by_age if r.order < passed.order]
            left = self.passes_left.setdefault(passed, len(older) + len(started_now) + 1)
            self.passes_left[passed] = left - 1
            return left > 0 and started.key < passed.key
        match self.policy:
            case "priority":
                levels = passed.priority - started.priority
                return levels > 0 and started.arrival - passed.arrival < MAX_WAIT_S * levels
            case "abort":
                return False
            case "vtc":
                if passed.salt in {request.salt for request in started_now}:
                    return started.salt != passed.salt
                since = unserved[passed.salt]
                return self.harness.now - since < MAX_WAIT_S or unserved[started.salt] <= since
        return waited < MAX_WAIT_S

    def check_preempted(self, running: list[Request]) -> None:
        """Only the last by rank are preempted."""
        still = [r for r in running if r.state is RequestState.RUNNING and r.rank]
        gone = [r for r in running if r.state is RequestState.WAITING]
        for request in gone:
            assert all(request.rank > other.rank for other in still)


def add_random(rng: random.Random, harness: Harness) -> None:
    harness.add(
        len(harness.expected),
        [rng.randrange(9) for _ in range(rng.randint(1, 12))],
        adapter=rng.choice(["", *"xxxxyyz"]),
        salt=rng.choice("aaaab"),
        priority=rng.choice([0, 0, 1, 2]),
        max_tokens=rng.randint(1, 12),
    )


@pytest.mark.parametrize("seed", range(20, 25))
@pytest.mark.parametrize("policy", OPTIONS)
def test_no_request_is_passed_over_for_longer_than_the_bound(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    harness = harness_of(policy, max_num_seqs=rng.randint(1, 4), num_pages=rng.choice([16, 64]))
    for name in "xyz":
        harness.register(name)
    witness = Witness(policy, harness)
    for turn in range(150):
        harness.now += rng.random()
        if turn < 90 and rng.random() < 0.5:
            for _ in range(rng.choice([1, 1, 4])):
                add_random(rng, harness)
        witness.plan()
        while harness.events and rng.random() < 0.7:
            harness.deliver_event()
        while harness.results:
            harness.commit()
        if policy == "abort":
            late = [
                r for r in harness.scheduler.waiting.by_age
                if r.admitted_at < 0 and r.arrival + SLO_S < harness.now - 1.0
            ]  # fmt: skip
            assert not late, "a request that must miss its objective still waits"
    harness.run()
    assert (witness.num_overtaken > 0) == (policy != "abort")


Favoured = Callable[[Harness, int], None]


def urgent(harness: Harness, number: int) -> None:
    harness.add(number, [1], max_tokens=1, priority=0)


def of_x(harness: Harness, number: int) -> None:
    harness.add(number, [1], max_tokens=1, adapter="x")


def of_new_tenant(harness: Harness, number: int) -> None:
    harness.add(number, [1], max_tokens=1, tenant=f"tenant {number}", salt="greedy")


@pytest.mark.parametrize(
    ("policy", "favoured", "victim", "bound_s"),
    [
        ("fcfs", urgent, {"priority": 9}, MAX_WAIT_S),
        ("priority", urgent, {"priority": 3}, 3 * MAX_WAIT_S),
        ("cluster", of_x, {"adapter": "y"}, MAX_WAIT_S),
        ("vtc", of_new_tenant, {"salt": "greedy"}, MAX_WAIT_S),
    ],
)
@pytest.mark.parametrize("ages", [True, False])
def test_an_endless_stream_of_favoured_requests_starves_nobody(
    policy: str, favoured: Favoured, victim: dict[str, Any], bound_s: float, ages: bool
) -> None:
    """A favoured request comes for each that is served; without ageing the victim starves."""
    harness = harness_of(
        policy,
        max_wait_s=MAX_WAIT_S if ages else 1e6,
        max_num_seqs=2 if policy == "cluster" else 1,
        check=False,
    )
    for name in "xy":
        harness.register(name)
        harness.add(name, [1], max_tokens=1, adapter=name)  # both are in pages from now on
        harness.run()
    if policy == "vtc":
        favoured(harness, 0)
        harness.add("meal", [1] * 40, max_tokens=1, **victim)  # puts its counter ahead
        harness.turn()
        harness.turn()
    if policy == "cluster":
        harness.add("anchor", [1], max_tokens=60, adapter="x")  # keeps x active in one of two seats
    favoured(harness, 1)
    favoured(harness, 2)
    harness.plan()
    began = harness.now
    harness.add("victim", [1] * 5, max_tokens=1, **victim)
    number = 3
    while harness.expected["victim"].end is None and harness.now < began + 3 * bound_s:
        favoured(harness, number)
        number += 1
        while harness.results:
            harness.commit()
        harness.now += 0.5
        harness.plan()
        while harness.events:
            harness.deliver_event()
    if ages:
        assert harness.now - began <= bound_s + 2.0, "the bound, and the requests being served"
    else:
        assert harness.expected["victim"].end is None


@pytest.mark.parametrize("policy", OPTIONS)
def test_preemptions_do_not_ping_pong(policy: str) -> None:
    """Each request is preempted a few times at most, however short memory is."""
    patient = {"ttft_slo_s": 1e6}
    own = {"policy": policy, "max_wait_s": MAX_WAIT_S, **OPTIONS[policy], **patient}
    harness = Harness(policy=own, num_pages=20, max_num_seqs=6)
    harness.register("x")
    for index in range(30):
        harness.add(index, [index] * 4, max_tokens=30, adapter="x" if index % 3 else "",
                    salt="ab"[index % 2], priority=index % 2)  # fmt: skip
    harness.run()
    assert 0 < harness.scheduler.stats()["num_preemptions"] <= 90
