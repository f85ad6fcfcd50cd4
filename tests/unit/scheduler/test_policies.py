"""What each policy answers to a given queue, without a scheduler around it."""

import math
import random
from array import array
from typing import Any

import pytest

from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policies.early_abort import LatencyEstimate, ServiceRate, num_to_drop
from loraplex.scheduler.policies.fair_share import VirtualTokenCounters
from loraplex.scheduler.policies.policy import Context, Policy
from loraplex.scheduler.policies.registry import make_policy
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.step_builder import StepBuilder
from loraplex.scheduler.waiting_queue import WaitingQueue

from helpers.fakes.fake_worker import sampling_spec
from helpers.scheduling.scheduler_harness import Harness


class Desk:
    """A policy with its queue; `walk` chooses like a scheduler with room for `num` requests."""

    def __init__(self, name: str, **options: Any) -> None:
        config = SchedulerConfig(policy=name, **options)
        self.policy: Policy = make_policy(config)
        self.queue = WaitingQueue(self.policy)
        self.resident: set[str] = set()
        self.requests: dict[str, Request] = {}
        self.num_added = 0

    def add(
        self,
        name: str,
        *,
        at: float = 0.0,
        adapter: str = "",
        tenant: str = "",
        priority: int = 0,
        num_prompt_tokens: int = 1,
    ) -> Request:
        request = Request(
            request_id=name,
            prompt_token_ids=array("i", [0] * num_prompt_tokens),
            sampling=sampling_spec(),
            adapter=adapter,
            salt=tenant,
            priority=priority,
        )
        self.num_added += 1
        request.order = self.num_added
        request.arrival = at
        if adapter:
            request.adapter_version = AdapterVersion(
                adapter, f"/{adapter}", 1, content_hash=adapter
            )
        request.key = request.rank = self.policy.key(request)
        self.requests[name] = request
        self.policy.on_arrival(request, at)
        self.queue.push(request)
        self.check()
        return request

    def context(self, now: float = 0.0, num_free: int = 100, lacked_room: bool = False) -> Context:
        return Context(now, num_free, lacked_room, lambda: sorted(self.resident))

    def order(self, now: float = 0.0, num_free: int = 100) -> str:
        """All in the order tried, when none can be chosen; nothing changes."""
        walk = self.policy.order(self.queue, self.context(now, num_free))
        return " ".join(str(request.request_id) for request in walk)

    def walk(self, num: int, now: float = 0.0, num_free: int = 100) -> str:
        """Choose the first `num`; they leave the queue."""
        context, taken = self.context(now, num_free), []
        for request in self.policy.order(self.queue, context):
            request.rank = self.policy.rank(request, now)
            context.num_free -= 1
            if request.admitted_at < 0:
                request.admitted_at = now
                self.policy.on_admitted(request, now)
            taken.append(request)
            if len(taken) == num:
                break
        self.queue.discard(taken)
        self.check()
        return " ".join(str(request.request_id) for request in taken)

    def preempt(self, name: str) -> None:
        self.queue.push(self.requests[name])
        self.check()

    def end(self, name: str) -> None:
        request = self.requests.pop(name)
        if request in self.queue.by_age:
            self.queue.remove(request)
        request.state = RequestState.FINISHED
        self.policy.on_end(request)
        self.check()

    def decode(self, *names: str) -> None:
        """A token for each of these."""
        step = StepBuilder(0, 1000)
        step.add_decodes([self.requests[name] for name in names], [1] * len(names))
        self.policy.on_result(step, 0.0)

    def check(self) -> None:
        self.queue.check_integrity()
        self.policy.check_integrity(self.requests.values())


def test_fcfs_takes_priorities_strictly_until_a_request_has_aged() -> None:
    desk = Desk("fcfs", max_wait_s=10.0)
    desk.add("late", at=0.0, priority=1)
    desk.add("b", at=5.0)
    desk.add("c", at=5.0, priority=-2)
    assert desk.order(now=9.9) == "c b late"
    assert desk.order(now=10.0) == "late c b"
    assert desk.order(now=15.0) == "late b c"


def test_fcfs_does_not_preempt_first_what_started_by_its_age() -> None:
    desk = Desk("fcfs", max_wait_s=10.0)
    old, young = desk.add("old", priority=1), desk.add("young", at=9.0)
    assert desk.walk(2, now=11.0) == "old young"
    assert old.rank < young.rank


def test_priority_ages_a_level_each_max_wait() -> None:
    desk = Desk("priority", max_wait_s=10.0)
    desk.add("low", at=0.0, priority=2)
    desk.add("before", at=19.9, priority=0)
    desk.add("after", at=20.1, priority=0)
    desk.add("middle", at=9.0, priority=1)
    assert desk.order(now=0.0) == desk.order(now=99.0) == "middle before low after"


def test_cluster_opens_adapters_in_order_and_then_stays_with_them() -> None:
    desk = Desk("cluster", max_adapters_per_batch=2, max_wait_s=100.0)
    for index, adapter in enumerate("xyzxwyx"):
        desk.add(f"{adapter}{index}", adapter=adapter)
    desk.resident = {"w"}
    assert desk.walk(2) == "x0 y1"
    assert desk.order() == "x3 y5 x6 w4 z2"  # active ones by age, then in pages, then the rest
    assert desk.order(num_free=0) == "x3 y5 x6 w4"  # no seat that others do not want
    desk.end("y1")
    assert desk.walk(1) == "z2", "y is no longer active, so the next in order opens its adapter"
    assert desk.order() == "x3 x6 w4 y5"


def test_cluster_counts_the_base_model_as_no_adapter() -> None:
    desk = Desk("cluster", max_adapters_per_batch=1, max_wait_s=100.0)
    desk.add("x", adapter="x")
    desk.add("y", adapter="y")
    desk.add("base")
    assert desk.walk(1) == "x"
    assert desk.order() == "base y"


def test_cluster_lets_the_aged_go_first() -> None:
    desk = Desk("cluster", max_adapters_per_batch=1, max_wait_s=10.0)
    desk.add("x1", at=0.0, adapter="x")
    assert desk.walk(1) == "x1"
    desk.add("y", at=1.0, adapter="y")
    desk.add("x2", at=2.0, adapter="x")
    assert desk.order(now=10.9) == "x2 y"
    assert desk.order(now=11.0) == "y x2"


@pytest.mark.parametrize("name", ["cluster", "abort", "vtc"])
def test_preempted_requests_resume_before_others_by_when_they_were_chosen(name: str) -> None:
    desk = Desk(name)
    for request_id in "abcd":
        desk.add(request_id)
    assert desk.walk(1, now=1.0) == "a"
    assert desk.walk(2, now=2.0) == "b c"
    for request_id in "cab":
        desk.preempt(request_id)
    assert desk.order(now=3.0) == "a b c d"
    assert desk.walk(4, now=99.0) == "a b c d"
    ranks = [desk.requests[request_id].rank for request_id in "abcd"]
    assert ranks == sorted(ranks) == [(1.0, 1), (2.0, 2), (2.0, 3), (99.0, 4)]


@pytest.mark.parametrize("seed", range(40))
def test_num_to_drop_is_the_least_that_lets_all_others_be_in_time(seed: int) -> None:
    rng = random.Random(seed)
    desk, now = Desk("abort"), 10.0
    for index in range(rng.randint(0, 30)):
        desk.add(str(index), at=now)
    requests = desk.queue.by_age
    for request, arrival in zip(
        requests, sorted(rng.uniform(0, now) for _ in requests), strict=True
    ):
        request.arrival = arrival
    rate = rng.choice([0.0, 0.5, 2.0, 7.0, math.inf])
    num_free, slo_s, first_token_s = rng.randint(0, 4), rng.uniform(1, 9), rng.uniform(0, 2)

    def all_in_time(num_dropped: int) -> bool:
        for place, request in enumerate(requests[num_dropped:], 1):
            queued = max(0, place - num_free)
            wait = queued / rate if rate else math.inf * queued if queued else 0.0
            if now + wait + first_token_s > request.arrival + slo_s:
                return False
        return True

    expected = next(n for n in range(len(requests) + 1) if all_in_time(n))
    found = num_to_drop(
        requests, first_token_at=now + first_token_s, slo_s=slo_s, rate=rate, num_free=num_free
    )
    assert found == expected


def test_num_to_drop_of_a_long_queue_is_found_within_the_stride() -> None:
    desk = Desk("abort")
    for index in range(2000):
        desk.add(str(index), at=index / 1000)
        desk.check = lambda: None  # type: ignore[method-assign]  # quadratic from here on
    found = num_to_drop(desk.queue.by_age, first_token_at=2.0, slo_s=6.0, rate=100.0, num_free=10)
    assert 2000 - 10 - 600 - 2000 // 256 <= found <= 2000 - 10 - 600 + 1


def test_service_rate_is_unknown_until_measured_and_forgotten_when_nobody_waits() -> None:
    rate = ServiceRate(window_s=8.0)
    assert rate.value == math.inf
    for _ in range(100):
        rate.observe(5, 0.5, waited=True)
    assert rate.value == pytest.approx(10.0, rel=0.05)
    rate.observe(0, 30.0, waited=False)
    assert rate.value == math.inf


def test_latency_estimate_covers_what_was_seen() -> None:
    estimate = LatencyEstimate()
    rng = random.Random(0)
    for _ in range(200):
        estimate.observe(rng.uniform(0.1, 0.3))
    assert 0.2 < estimate.value < 0.4


def test_abort_gives_up_the_oldest_and_keeps_order() -> None:
    desk = Desk("abort", ttft_slo_s=6.0)
    for second in range(8):
        desk.add(str(second), at=float(second))
    dropped = desk.policy.requests_to_drop(desk.queue, desk.context(now=7.5, num_free=0))
    assert [request.request_id for request in dropped] == ["0", "1"]
    for request in list(dropped):
        desk.end(str(request.request_id))
    assert desk.order(now=7.5) == "2 3 4 5 6 7"


def test_abort_never_gives_up_what_has_started() -> None:
    desk = Desk("abort", ttft_slo_s=6.0)
    desk.add("a")
    assert desk.walk(1) == "a"
    desk.preempt("a")
    assert not desk.policy.requests_to_drop(desk.queue, desk.context(now=100.0))


def test_vtc_serves_whoever_got_least() -> None:
    desk = Desk("vtc")
    for index in range(4):
        desk.add(f"h{index}", tenant="heavy", num_prompt_tokens=10)
    desk.add("l0", tenant="light", num_prompt_tokens=4)
    desk.add("l1", tenant="light", num_prompt_tokens=4)
    assert desk.walk(4) == "h0 l0 l1 h1"  # 0 0, then 10 4, 10 8, 10 and gone
    desk.decode("h0", "h1", "l0")
    assert isinstance(desk.policy, VirtualTokenCounters)
    assert desk.policy.counters() == {"heavy": 24.0, "light": 10.0}


def test_vtc_divides_service_by_weight_and_can_share_by_adapter() -> None:
    weights = (("x", "2"), ("y", "0.5"))
    desk = Desk("vtc", fair_share_by="adapter", fair_share_weights=weights)
    for adapter in "xyz":
        desk.add(adapter, tenant="same", adapter=adapter, num_prompt_tokens=6)
    assert desk.walk(3) == "x y z"
    assert isinstance(desk.policy, VirtualTokenCounters)
    assert desk.policy.counters() == {"x": 3.0, "y": 12.0, "z": 6.0}


def test_vtc_lifts_a_client_that_comes_back() -> None:
    desk = Desk("vtc")
    policy = desk.policy
    assert isinstance(policy, VirtualTokenCounters)
    desk.add("a0", tenant="a", num_prompt_tokens=50)
    assert desk.walk(1) == "a0"
    desk.add("b0", tenant="b")  # nobody waits: lifted to the last that did
    assert policy.counters() == {"a": 50.0, "b": 50.0}
    desk.add("a1", tenant="a")
    desk.add("b1", tenant="b", num_prompt_tokens=9)
    assert desk.walk(2) == "b0 a1"
    desk.decode("b0", "b0")
    desk.add("c0", tenant="c")  # b waits, with 51 + 4
    assert policy.counters()["c"] == 55.0
    assert desk.order() == "b1 c0"


def test_vtc_passes_over_what_it_could_not_choose_and_comes_back_to_it() -> None:
    desk = Desk("vtc")
    for tenant in "ab":
        for index in range(2):
            desk.add(f"{tenant}{index}", tenant=tenant)
    for _ in range(3):
        assert desk.order() == "a0 a1 b0 b1"
    desk.end("a0")
    desk.end("a1")
    assert desk.order() == "b0 b1"
    desk.add("a2", tenant="a")
    assert desk.order() == "b0 b1 a2"


def test_vtc_forgets_clients_that_owe_nothing() -> None:
    desk = Desk("vtc")
    policy = desk.policy
    assert isinstance(policy, VirtualTokenCounters)
    for index in range(1500):
        desk.check = lambda: None  # type: ignore[method-assign]  # quadratic
        desk.add(str(index), tenant=f"t{index}", num_prompt_tokens=5)
        assert desk.walk(1) == str(index)
        desk.end(str(index))
    assert len(policy.counters()) <= 1025


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "lifo"}, "policy"),
        ({"max_wait_s": 0.0}, "max_wait_s"),
        ({"max_wait_s": math.inf}, "max_wait_s"),
        ({"ttft_slo_s": -1.0}, "ttft_slo_s"),
        ({"ttft_slo_s": math.nan}, "ttft_slo_s"),
        ({"max_adapters_per_batch": 0}, "max_adapters_per_batch"),
        ({"fair_share_by": "user"}, "fair_share_by"),
        ({"fair_share_weights": (("a", "0"),)}, "fair_share_weights"),
        ({"fair_share_weights": (("a", "many"),)}, "fair_share_weights"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SchedulerConfig(**options)


def test_a_request_that_cannot_be_in_time_ends_with_the_code_deadline() -> None:
    harness = Harness(policy={"policy": "abort", "ttft_slo_s": 5.0}, max_num_seqs=1)
    harness.add("runs", [1], max_tokens=30)
    harness.add("waits", [2], max_tokens=1)
    harness.run()
    code, text = harness.error_of("waits")
    assert code == "deadline"
    assert "ttft_slo_s" in text
    stats = harness.scheduler.stats()
    assert (stats["num_deadline_drops"], stats["finished"]["error"]) == (1, 1)
    harness.add("now", [3], max_tokens=1)
    harness.run()
    end = harness.expected["now"].end
    assert end is not None
    assert end.finish_reason == "length"
