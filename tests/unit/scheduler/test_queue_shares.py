"""A requester may have no more waiting requests than the queue has free places."""

import random
from collections import Counter
from typing import Any

import pytest

from loraplex.scheduler.request import RequestRefused

from helpers.scheduling.scheduler_harness import Harness

QUEUE = 12


def fill(harness: Harness, turns: list[dict[str, Any]]) -> Counter[int]:
    """Lets the requesters ask in turns until all are refused. Returns what each one got."""
    accepted: Counter[int] = Counter()
    number = len(harness.expected)
    while True:
        before = accepted.total()
        for index, requester in enumerate(turns):
            number += 1
            accepted[index] += harness.try_add(number, [1], max_tokens=1, **requester) == ""
        if accepted.total() == before:
            return accepted


@pytest.mark.parametrize(
    ("turns", "shares"),
    [
        ([{"tenant": "ann"}], [6]),
        ([{"tenant": "ann"}, {"tenant": "ben"}], [4, 4]),
        ([{"tenant": "ann"}, {"tenant": "ben"}, {"tenant": "cid"}], [3, 3, 3]),
        ([{"client": b"1"}, {"client": b"2"}], [4, 4]),
        # The connections of a tenant share one part.
        ([{"tenant": "ann", "client": b"1"}, {"tenant": "ann", "client": b"2"}], [3, 3]),
        ([{}], [QUEUE]),  # the only client of a private engine
    ],
)
def test_shares_of_a_full_queue(turns: list[dict[str, Any]], shares: list[int]) -> None:
    harness = Harness(max_queue_len=QUEUE, max_num_seqs=1)
    assert list(fill(harness, turns).values()) == shares
    harness.run()


def test_a_greedy_tenant_leaves_room_and_is_told_why() -> None:
    harness = Harness(max_queue_len=QUEUE, max_num_seqs=1)
    fill(harness, [{"tenant": "greedy"}])
    with pytest.raises(RequestRefused, match="6 requests of tenant 'greedy' wait") as refusal:
        harness.add("more", [1], max_tokens=1, tenant="greedy")
    assert refusal.value.code == "queue_full"
    assert harness.try_add("other", [1], max_tokens=1, tenant="other") == ""
    harness.run()
    assert harness.try_add("again", [1], max_tokens=1, tenant="greedy") == ""
    harness.run()


def test_requests_that_wait_for_their_adapter_count() -> None:
    harness = Harness(max_queue_len=QUEUE)
    harness.register("x")
    for number in range(6):
        harness.add(number, [1], adapter="x", max_tokens=1, tenant="ann")
    assert harness.try_add("more", [1], max_tokens=1, tenant="ann") == "queue_full"
    harness.run()


@pytest.mark.parametrize("seed", range(3))
def test_no_history_lets_one_requester_take_the_last_place(seed: int) -> None:
    rng = random.Random(seed)
    harness = Harness(max_queue_len=QUEUE, max_num_seqs=2)
    for number in range(150):
        tenant = rng.choice(["greedy"] * 5 + ["ann", "ben"])
        waiting = Counter(
            request.tenant
            for request in harness.requests.values()
            if request.state.value == "waiting"
        )
        free = QUEUE - waiting.total()
        code = harness.try_add(number, [1], max_tokens=rng.randint(1, 3), tenant=tenant)
        assert (code == "") == (waiting[tenant] < free)
        if rng.random() < 0.3:
            harness.turn()
        elif rng.random() < 0.2:
            harness.abort(rng.choice(list(harness.expected)))
    harness.run()
