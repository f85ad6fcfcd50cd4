"""The limits of tenants: requests and tokens a minute, and unfinished requests."""

import random
from collections import Counter
from typing import Any

import pytest

from loraplex.scheduler.request import RequestRefused
from loraplex.scheduler.tenants.tenant import Tenant
from loraplex.scheduler.tenants.token_bucket import TokenBucket

from helpers.scheduling.policy_queue import PolicyQueue
from helpers.scheduling.scheduler_harness import Harness


def limited(*tenants: Tenant, **options: Any) -> Harness:
    harness = Harness(**options)
    harness.scheduler.tenants.set_tenants(tenants, harness.now)
    return harness


def refusal_of(harness: Harness, name: Any, prompt: list[int], **options: Any) -> RequestRefused:
    with pytest.raises(RequestRefused) as refusal:
        harness.add(name, prompt, **options)
    return refusal.value


def test_a_bucket_holds_a_minute_and_fills_evenly() -> None:
    bucket = TokenBucket(60, now=0.0)
    assert bucket.wait_s(60, 0.0) == 0.0
    bucket.take(60, 0.0)
    assert bucket.wait_s(3, 0.0) == 3.0
    assert bucket.wait_s(3, 2.5) == 0.5
    assert bucket.wait_s(61, 1000.0) == float("inf")
    bucket.take(60, 1000.0)
    bucket.give_back(-60, 1000.0)  # used, not taken
    assert bucket.wait_s(1, 1000.0) == 61.0
    bucket.set_limit(120, 1000.0)
    assert bucket.wait_s(2, 1000.0) == 1.0


def test_requests_a_minute() -> None:
    harness = limited(Tenant("ann", requests_per_minute=2))
    for name in ("a", "b"):
        harness.add(name, [1], max_tokens=1, tenant="ann")
    refusal = refusal_of(harness, "c", [1], max_tokens=1, tenant="ann")
    assert (refusal.code, refusal.retry_after_s) == ("rate_limited", 30.0)
    assert "tenant 'ann' has used up its 2 requests a minute" in refusal.text
    for name in ("other", "operator"):
        harness.add(name, [1], max_tokens=1, tenant=name.removeprefix("operator"))
    harness.now += 30.0
    harness.add("c", [1], max_tokens=1, tenant="ann")
    assert harness.try_add("d", [1], max_tokens=1, tenant="ann") == "rate_limited"
    harness.run()


def test_what_is_refused_for_another_reason_costs_nothing() -> None:
    harness = limited(Tenant("ann", requests_per_minute=1, tokens_per_minute=100))
    assert harness.try_add("bad", [], tenant="ann") == "bad_request"
    assert harness.try_add("unknown", [1], adapter="x", tenant="ann") == "unknown_adapter"
    assert harness.try_add("good", [1], max_tokens=4, tenant="ann") == ""
    harness.run()


def test_tokens_a_minute_are_reserved_and_given_back() -> None:
    harness = limited(Tenant("ann", tokens_per_minute=40))
    harness.add("a", [1] * 10, max_tokens=20, tenant="ann", stop_token_ids=list(range(1000)))
    refusal = refusal_of(harness, "b", [1] * 10, max_tokens=10, tenant="ann")
    assert (refusal.code, refusal.retry_after_s) == ("rate_limited", 15.0)
    assert "may take 20 tokens" in refusal.text and "lower max_tokens" in refusal.text
    assert harness.try_add("c", [1] * 5, max_tokens=5, tenant="ann") == ""
    harness.abort("c")  # before it ran: it used nothing
    while harness.expected["a"].end is None:
        harness.turn()
    assert len(harness.expected["a"].token_ids) == 1
    assert harness.now < 9.0  # for which six tokens come
    assert harness.try_add("d", [1] * 10, max_tokens=19, tenant="ann") == ""
    assert harness.try_add("e", [1] * 4, max_tokens=3, tenant="ann") == "rate_limited"
    harness.run()


def test_a_request_larger_than_a_minute_runs_and_is_paid_later() -> None:
    harness = limited(Tenant("ann", tokens_per_minute=6))
    harness.add("large", [1] * 10, max_tokens=2, tenant="ann")
    assert harness.try_add("b", [1], max_tokens=1, tenant="ann") == "rate_limited"
    while harness.expected["large"].end is None:
        harness.turn()
    refusal = refusal_of(harness, "c", [1], max_tokens=1, tenant="ann")
    # Six of 12 tokens were there, and two more are asked for: 8 tokens at 6 a minute.
    assert harness.now + refusal.retry_after_s == pytest.approx(80.0)
    harness.now = 80.01
    assert harness.try_add("d", [1], max_tokens=1, tenant="ann") == ""
    harness.run()


def test_the_answers_of_one_request() -> None:
    tenant = Tenant("ann", requests_per_minute=2, tokens_per_minute=50, max_running_requests=3)
    harness = limited(tenant)
    options: dict[str, Any] = {"max_tokens": 5, "tenant": "ann"}
    for index in range(3):
        harness.add(index, [1] * 5, answer=(index, 3), **options)
    refusal = refusal_of(harness, "more", [1], **options)
    assert (refusal.code, refusal.retry_after_s) == ("too_many_requests", 1.0)
    assert "has 3 unfinished requests and asks for 1 more" in refusal.text
    harness.abort(1)
    assert harness.try_add("two", [1], answer=(0, 2), **options) == "too_many_requests"
    assert harness.try_add("one", [1], **options) == ""  # the second of this minute
    harness.abort("one")
    assert harness.try_add("third", [1], **options) == "rate_limited"
    harness.run()


def test_new_limits_hold_from_then_on() -> None:
    harness = limited(Tenant("ann", max_running_requests=1))
    harness.add("a", [1], max_tokens=9, tenant="ann")
    assert harness.try_add("b", [1], max_tokens=9, tenant="ann") == "too_many_requests"
    limiter = harness.scheduler.tenants
    limiter.set_tenants([Tenant("ann", max_running_requests=2, requests_per_minute=1)], harness.now)
    assert harness.try_add("c", [1], max_tokens=9, tenant="ann") == ""
    assert harness.try_add("d", [1], max_tokens=9, tenant="ann") == "too_many_requests"
    limiter.set_tenants([Tenant("ann", requests_per_minute=1)], harness.now)
    assert harness.try_add("e", [1], max_tokens=9, tenant="ann") == "rate_limited"  # as before
    limiter.set_tenants([], harness.now)
    assert harness.try_add("f", [1], max_tokens=9, tenant="ann") == ""
    harness.run()


@pytest.mark.parametrize("seed", range(4))
def test_no_history_exceeds_the_limits(seed: int) -> None:
    """Over any time of t seconds, from the oracle's own record of what was accepted."""
    rng = random.Random(seed)
    tenant = Tenant("ann", requests_per_minute=30, tokens_per_minute=300, max_running_requests=4)
    harness = limited(tenant, max_num_seqs=3)
    accepted: list[tuple[float, int]] = []
    for number in range(300):
        name = rng.choice(["ann", "ann", "ben"])
        size = rng.randint(1, 12)
        code = harness.try_add(number, [1] * size, max_tokens=size, tenant=name)
        if name == "ann" and code == "":
            accepted.append((harness.now, number))
        assert name == "ann" or code == ""
        for _ in range(rng.randint(0, 3)):
            harness.turn()
        if rng.random() < 0.2:
            harness.abort(rng.choice(list(harness.expected)))
        of_ann = [r for r in harness.requests.values() if r.tenant == "ann"]
        assert sum(request.state.value != "finished" for request in of_ann) <= 4
    harness.run()
    expected = harness.expected
    for first, (start, _) in enumerate(accepted):
        num_tokens = 0
        for last in range(first, len(accepted)):
            at, number = accepted[last]
            num_tokens += len(expected[number].token_ids) and len(expected[number].prompt)
            num_tokens += len(expected[number].token_ids)
            minutes = 1 + (at - start) / 60
            assert last - first + 1 <= 30 * minutes + 1e-6
            assert num_tokens <= 300 * minutes + 1e-6
    assert len(accepted) > 50


def test_weights_of_tenants_move_the_shares() -> None:
    """With equal requests waiting, admissions follow the weights, also after a change."""

    def share_of_ann(weights: dict[str, float]) -> int:
        queue = PolicyQueue("vtc", fair_share_weights=(("ben", "1"), ("ann", "5")))
        for index in range(40):
            for name in ("ann", "ben"):
                queue.add(f"{name}{index}", tenant=name)
        queue.admit(1)  # the clients are known
        queue.policy.set_weights(weights)
        return queue.admit(19).count("ann")

    assert share_of_ann({"ann": 1.0}) in (9, 10)
    assert share_of_ann({"ann": 3.0}) in (14, 15)
    assert share_of_ann({"ann": 1.0, "ben": 3.0}) in (4, 5)
    assert share_of_ann({}) in (15, 16)  # as configured


def test_the_weights_of_set_tenants_reach_the_policy() -> None:
    harness = limited(
        Tenant("ann", weight=3.0), Tenant("ben"), max_num_seqs=1, policy={"policy": "vtc"}
    )
    for number in range(40):
        harness.add(number, [number], max_tokens=3, tenant=("ann", "ben")[number % 2])
    for _ in range(1000):
        harness.turn()
        ended = [n for n, expected in harness.expected.items() if expected.end is not None]
        if len(ended) == 16:
            break
    assert Counter(n % 2 for n in ended) == {0: 12, 1: 4}
    harness.run()
