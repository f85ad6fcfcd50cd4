"""Orders and refusals of each policy for a given queue, without a scheduler around it."""

import math
import random
from typing import Any

import pytest

from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policies.early_abort import LatencyEstimate, ServiceRate, num_to_drop
from loraplex.scheduler.policies.fair_share import VirtualTokenCounters

from helpers.scheduling.policy_queue import PolicyQueue
from helpers.scheduling.scheduler_harness import Harness


def test_fcfs_takes_priorities_strictly_until_a_request_has_aged() -> None:
    queue = PolicyQueue("fcfs", max_wait_s=10.0)
    queue.add("late", at=0.0, priority=1)
    queue.add("b", at=5.0)
    queue.add("c", at=5.0, priority=-2)
    assert queue.names_in_order(now=9.9) == "c b late"
    assert queue.names_in_order(now=10.0) == "late c b"
    assert queue.names_in_order(now=15.0) == "late c b"


def test_fcfs_keeps_priorities_in_a_queue_longer_than_the_wait() -> None:
    queue = PolicyQueue("fcfs", max_wait_s=10.0)
    for index in range(4):
        queue.add(f"low{index}", at=float(index), priority=5)
    for index in range(3):
        queue.add(f"high{index}", at=5.0 + index)
    chosen = [queue.admit(1, now=100.0) for _ in range(7)]
    assert chosen == ["low0", "high0", "low1", "high1", "low2", "high2", "low3"]


def test_fcfs_lets_clients_take_turns() -> None:
    """A flood of one client holds up nobody who has a request or two waiting."""
    queue = PolicyQueue("fcfs")
    for index in range(5):
        queue.add(f"a{index}", client=b"a")
    assert queue.admit(2) == "a0 a1"
    for name in ("b0", "b1", "c0"):
        queue.add(name, client=name[:1].encode())
    assert queue.names_in_order() == "a2 b0 c0 a3 b1 a4"
    assert queue.admit(3) == "a2 b0 c0"
    queue.add("c1", client=b"c")  # it waited for its answer
    assert queue.names_in_order() == "a3 b1 c1 a4"
    queue.add("urgent", client=b"a", priority=-1)
    assert queue.names_in_order() == "urgent a3 b1 c1 a4"


def test_fcfs_serves_one_client_and_clients_with_one_request_as_they_come() -> None:
    for clients in (["a"] * 6, list("abcdef")):
        queue = PolicyQueue("fcfs")
        names = [f"{client}{index}" for index, client in enumerate(clients)]
        for name in names[:4]:
            queue.add(name, client=name[:1].encode())
        assert queue.admit(2) == " ".join(names[:2])
        queue.end(names[0])
        for name in names[4:]:
            queue.add(name, client=name[:1].encode())
        assert queue.names_in_order() == " ".join(names[2:])


def test_fcfs_forgets_the_turns_of_a_client_that_cancels_all() -> None:
    queue = PolicyQueue("fcfs")
    for index in range(9):
        queue.add(f"a{index}", client=b"a")
    for index in range(9):
        queue.end(f"a{index}")
    for name in ("b0", "b1", "a9"):
        queue.add(name, client=name[:1].encode())
    assert queue.names_in_order() == "b0 a9 b1"


def test_fcfs_does_not_preempt_first_what_started_by_its_age() -> None:
    queue = PolicyQueue("fcfs", max_wait_s=10.0)
    old, young = queue.add("old", priority=1), queue.add("young", at=9.0)
    assert queue.admit(2, now=11.0) == "old young"
    assert old.rank < young.rank


def test_priority_ages_a_level_each_max_wait() -> None:
    queue = PolicyQueue("priority", max_wait_s=10.0)
    queue.add("low", at=0.0, priority=2)
    queue.add("before", at=19.9, priority=0)
    queue.add("after", at=20.1, priority=0)
    queue.add("middle", at=9.0, priority=1)
    assert (
        queue.names_in_order(now=0.0) == queue.names_in_order(now=99.0) == "middle before low after"
    )


def test_cluster_opens_adapters_in_order_and_then_stays_with_them() -> None:
    queue = PolicyQueue("cluster", max_adapters_per_batch=2, max_wait_s=100.0)
    for index, adapter in enumerate("xyzxwyx"):
        queue.add(f"{adapter}{index}", adapter=adapter)
    queue.resident = {"w"}
    assert queue.admit(2) == "x0 y1"
    assert (
        queue.names_in_order() == "x3 y5 x6 w4 z2"
    )  # active ones by age, then in pages, then the rest
    assert queue.names_in_order(num_free=0) == "x3 y5 x6 w4"  # no seat that others do not want
    queue.end("y1")
    assert queue.admit(1) == "z2", "y is no longer active, so the next in order opens its adapter"
    assert queue.names_in_order() == "x3 x6 w4 y5"


def test_cluster_counts_the_base_model_as_no_adapter() -> None:
    queue = PolicyQueue("cluster", max_adapters_per_batch=1, max_wait_s=100.0)
    queue.add("x", adapter="x")
    queue.add("y", adapter="y")
    queue.add("base")
    assert queue.admit(1) == "x"
    assert queue.names_in_order() == "base y"


def test_cluster_lets_the_aged_go_first() -> None:
    queue = PolicyQueue("cluster", max_adapters_per_batch=1, max_wait_s=10.0)
    queue.add("x1", at=0.0, adapter="x")
    assert queue.admit(1) == "x1"
    queue.add("y", at=1.0, adapter="y")
    queue.add("x2", at=2.0, adapter="x")
    assert queue.names_in_order(now=10.9) == "x2 y"
    assert queue.names_in_order(now=11.0) == "y x2"


@pytest.mark.parametrize("name", ["cluster", "abort", "vtc"])
def test_preempted_requests_resume_before_others_by_when_they_were_chosen(name: str) -> None:
    queue = PolicyQueue(name)
    for request_id in "abcd":
        queue.add(request_id)
    assert queue.admit(1, now=1.0) == "a"
    assert queue.admit(2, now=2.0) == "b c"
    for request_id in "cab":
        queue.preempt(request_id)
    assert queue.names_in_order(now=3.0) == "a b c d"
    assert queue.admit(4, now=99.0) == "a b c d"
    ranks = [queue.requests[request_id].rank for request_id in "abcd"]
    assert ranks == sorted(ranks) == [(1.0, 1), (2.0, 2), (2.0, 3), (99.0, 4)]


@pytest.mark.parametrize("seed", range(40))
def test_num_to_drop_is_the_least_that_lets_all_others_be_in_time(seed: int) -> None:
    rng = random.Random(seed)
    queue, now = PolicyQueue("abort"), 10.0
    for index in range(rng.randint(0, 30)):
        queue.add(str(index), at=now)
    requests = queue.waiting.by_age
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
    queue = PolicyQueue("abort")
    for index in range(2000):
        queue.add(str(index), at=index / 1000)
        queue.check = lambda: None  # type: ignore[method-assign]  # quadratic from here on
    found = num_to_drop(
        queue.waiting.by_age, first_token_at=2.0, slo_s=6.0, rate=100.0, num_free=10
    )
    assert 2000 - 10 - 600 - 2000 // 256 <= found <= 2000 - 10 - 600 + 1


def test_service_rate_is_unknown_until_measured_and_forgotten_when_no_request_waits() -> None:
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
    queue = PolicyQueue("abort", ttft_slo_s=6.0)
    for second in range(8):
        queue.add(str(second), at=float(second))
    dropped = queue.policy.requests_to_drop(queue.waiting, queue.context(now=7.5, num_free=0))
    assert [request.request_id for request in dropped] == ["0", "1"]
    for request in list(dropped):
        queue.end(str(request.request_id))
    assert queue.names_in_order(now=7.5) == "2 3 4 5 6 7"


def test_abort_never_gives_up_what_has_started() -> None:
    queue = PolicyQueue("abort", ttft_slo_s=6.0)
    queue.add("a")
    assert queue.admit(1) == "a"
    queue.preempt("a")
    assert not queue.policy.requests_to_drop(queue.waiting, queue.context(now=100.0))


def test_vtc_serves_whoever_got_least() -> None:
    queue = PolicyQueue("vtc")
    for index in range(4):
        queue.add(f"h{index}", tenant="heavy", num_prompt_tokens=10)
    queue.add("l0", tenant="light", num_prompt_tokens=4)
    queue.add("l1", tenant="light", num_prompt_tokens=4)
    assert queue.admit(4) == "h0 l0 l1 h1"  # 0 0, then 10 4, 10 8, 10 and gone
    queue.decode("h0", "h1", "l0")
    assert isinstance(queue.policy, VirtualTokenCounters)
    assert queue.policy.counters() == {"heavy": 24.0, "light": 10.0}


def test_vtc_divides_service_by_weight_and_can_share_by_adapter() -> None:
    weights = (("x", "2"), ("y", "0.5"))
    queue = PolicyQueue("vtc", fair_share_by="adapter", fair_share_weights=weights)
    for adapter in "xyz":
        queue.add(adapter, tenant="same", adapter=adapter, num_prompt_tokens=6)
    assert queue.admit(3) == "x y z"
    assert isinstance(queue.policy, VirtualTokenCounters)
    assert queue.policy.counters() == {"x": 3.0, "y": 12.0, "z": 6.0}


def test_vtc_lifts_a_client_that_comes_back() -> None:
    queue = PolicyQueue("vtc")
    policy = queue.policy
    assert isinstance(policy, VirtualTokenCounters)
    queue.add("a0", tenant="a", num_prompt_tokens=50)
    assert queue.admit(1) == "a0"
    queue.add("b0", tenant="b")  # no tenant waits: lifted to the last that did
    assert policy.counters() == {"a": 50.0, "b": 50.0}
    queue.add("a1", tenant="a")
    queue.add("b1", tenant="b", num_prompt_tokens=9)
    assert queue.admit(2) == "b0 a1"
    queue.decode("b0", "b0")
    queue.add("c0", tenant="c")  # b waits, with 51 + 4
    assert policy.counters()["c"] == 55.0
    assert queue.names_in_order() == "b1 c0"


def test_vtc_passes_over_what_it_could_not_choose_and_comes_back_to_it() -> None:
    queue = PolicyQueue("vtc")
    for tenant in "ab":
        for index in range(2):
            queue.add(f"{tenant}{index}", tenant=tenant)
    for _ in range(3):
        assert queue.names_in_order() == "a0 a1 b0 b1"
    queue.end("a0")
    queue.end("a1")
    assert queue.names_in_order() == "b0 b1"
    queue.add("a2", tenant="a")
    assert queue.names_in_order() == "b0 b1 a2"


def test_vtc_forgets_clients_that_owe_nothing() -> None:
    queue = PolicyQueue("vtc")
    policy = queue.policy
    assert isinstance(policy, VirtualTokenCounters)
    for index in range(1500):
        queue.check = lambda: None  # type: ignore[method-assign]  # quadratic
        queue.add(str(index), tenant=f"t{index}", num_prompt_tokens=5)
        assert queue.admit(1) == str(index)
        queue.end(str(index))
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
