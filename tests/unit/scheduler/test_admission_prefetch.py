"""Adapters of waiting requests are loaded ahead, at no cost to other requests."""

import random
from collections import deque
from typing import Any

import pytest

from loraplex.scheduler.adapters.prefetch import LOOK_AHEAD, MAX_LOADS
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import Request
from loraplex.scheduler.scheduler import Scheduler

from helpers.scheduling.scheduler_harness import Harness

BLOCK = 4


def make(**options: Any) -> Harness:
    options = {"enable_prefix_caching": False, "block_tokens": BLOCK, **options}
    return Harness(**options)


def serve(harness: Harness, load_s: float) -> dict[Any, float]:
    """Steps take a second, loads `load_s`; returns when each request got its first token."""
    due: deque[float] = deque()
    first: dict[Any, float] = {}
    while harness.scheduler.num_unfinished:
        harness.plan()
        due.extend([harness.now + load_s] * (len(harness.events) - len(due)))
        harness.now += 1.0
        if harness.results:
            harness.commit()
        while due and due[0] <= harness.now:
            due.popleft()
            harness.deliver_event()
        for request_id, expectation in harness.expected.items():
            if expectation.token_ids:
                first.setdefault(request_id, harness.now)
    return first


def prefetches(harness: Harness) -> int:
    return int(harness.scheduler.stats()["num_adapter_prefetches"])


def first_token_behind_another(*, warm: bool) -> float:
    """Return when a request for x that waits for the only slot gets its first token."""
    harness = make(max_num_seqs=1)
    harness.register("x", num_pages=3)
    if warm:
        harness.add("before", [1], adapter="x", max_tokens=1)
        serve(harness, 0.0)
    harness.add("runs", [1], max_tokens=10)
    harness.add("waits", [2], adapter="x", max_tokens=2)
    harness.settle()
    start = harness.now
    first = serve(harness, 3.0)
    assert harness.worker.num_loads == 1
    assert prefetches(harness) == (not warm)
    return first["waits"] - start


def test_adapter_that_is_loaded_ahead_costs_its_request_nothing() -> None:
    assert first_token_behind_another(warm=False) == first_token_behind_another(warm=True)


def test_load_begins_though_no_step_can_be_planned() -> None:
    harness = make(max_num_seqs=4, max_steps_in_flight=1)
    harness.register("x", num_pages=2)
    harness.add("known", [1], adapter="x", max_tokens=1)
    serve(harness, 0.0)
    harness.register("y", num_pages=2)
    harness.add("runs", [1], max_tokens=9)
    assert harness.plan() is not None
    harness.add("comes", [2], adapter="y", max_tokens=2)
    harness.settle()
    assert harness.plan() is None
    assert [event.content_hash for event in harness.events] == ["y"]
    assert set(serve(harness, 1.0)) == {"known", "runs", "comes"}


def test_request_without_room_has_its_adapter_loaded_and_lets_nobody_past() -> None:
    harness = make(num_pages=19, max_num_seqs=4)
    harness.register("x", num_pages=2)
    harness.register("y", num_pages=1)
    harness.add("runs", [1] * 28, max_tokens=5)  # 7 pages of 18
    harness.plan()
    harness.commit()
    harness.add("head", [2] * 40, adapter="x", max_tokens=2)
    harness.add("small", [3], adapter="y", max_tokens=1)
    harness.settle()
    harness.plan()
    assert [event.content_hash for event in harness.events] == ["x"]
    for _ in range(3):  # room for `small` there is, and for y; but `head` is first
        harness.commit()
        plan = harness.plan()
        assert plan is not None
        assert not plan.new_requests
    assert len(harness.events) == 1
    harness.settle()
    first = serve(harness, 3.0)
    assert first["head"] <= first["small"]
    assert harness.worker.num_loads == 2


@pytest.mark.parametrize(("num_pages", "is_loaded"), [(12, True), (11, False)])
def test_running_requests_keep_pages_to_grow_by(num_pages: int, is_loaded: bool) -> None:
    harness = make(num_pages=num_pages, max_num_seqs=2)
    harness.register("x", num_pages=3)
    harness.add("a", [1] * 5, max_tokens=20)  # two pages each, and two in the next eight steps
    harness.add("b", [2] * 5, max_tokens=20)
    harness.add("waits", [3], adapter="x", max_tokens=1)
    harness.settle()
    harness.plan()
    assert (harness.resident() == {"x"}) == is_loaded
    serve(harness, 3.0)


def test_few_loads_are_in_flight_and_none_is_far_ahead() -> None:
    harness = make(num_pages=200, max_num_seqs=1, max_adapter_slots=60)
    harness.add("runs", [1], max_tokens=60)
    for index in range(40):
        harness.register(f"x{index}")
        harness.add(index, [2], adapter=f"x{index}", max_tokens=1)
    harness.settle()
    harness.plan()
    assert len(harness.events) == MAX_LOADS
    for _ in range(LOOK_AHEAD + 5):
        if harness.events:
            harness.deliver_event()
        harness.commit()
        harness.plan()
        assert len(harness.events) <= MAX_LOADS
    assert harness.resident() == {f"x{index}" for index in range(LOOK_AHEAD)}
    serve(harness, 1.0)
    assert harness.worker.num_loads == 40


def test_adapter_of_another_waiting_request_is_not_evicted_for_it() -> None:
    harness = make(max_num_seqs=1, max_adapter_slots=2)
    for name in ("runs", "soon", "first"):
        harness.register(name)
    harness.add("before", [1], adapter="soon", max_tokens=1)
    serve(harness, 0.0)
    harness.add("runs", [1], adapter="runs", max_tokens=9)
    while "runs" not in harness.resident() or not harness.expected["runs"].token_ids:
        harness.turn()
    harness.add("first", [2], adapter="first", max_tokens=1)
    harness.add("soon", [3], adapter="soon", max_tokens=1)
    harness.settle()
    harness.plan()
    assert harness.resident() == {"runs", "soon"}
    serve(harness, 1.0)


def test_something_dearer_is_not_evicted_for_it() -> None:
    """A load of three pages is dearer a page than one of ten."""
    harness = make(num_pages=16, max_num_seqs=1)
    harness.register("dear", num_pages=3)
    harness.register("cheap", num_pages=10)
    harness.add("before", [1], adapter="dear", max_tokens=1)
    serve(harness, 0.0)
    harness.add("runs", [1] * 9, max_tokens=3)  # 3 pages of 15: 9 are free
    harness.add("waits", [2], adapter="cheap", max_tokens=1)
    harness.settle()
    harness.plan()
    assert harness.resident() == {"dear"}
    serve(harness, 1.0)
    assert harness.worker.num_loads == 2


def test_failed_load_ahead_fails_its_own_requests_once() -> None:
    harness = make(max_num_seqs=1)
    harness.register("x")
    harness.add("runs", [1], max_tokens=6)
    harness.add("waits", [2], adapter="x", max_tokens=1)
    harness.add("base", [3], max_tokens=1)
    harness.settle()
    harness.file("/x/0", "", error="disk error")
    serve(harness, 1.0)
    assert "disk error" in harness.error_of("waits")[1]
    assert harness.expected["base"].end is not None
    assert harness.worker.num_loads == 1
    harness.check_all_ended()


def test_load_ahead_outlives_the_request_that_wanted_it() -> None:
    harness = make(max_num_seqs=1)
    harness.register("x")
    harness.add("runs", [1], max_tokens=6)
    harness.add("waits", [2], adapter="x", max_tokens=1)
    harness.settle()
    harness.plan()
    harness.abort("waits")
    serve(harness, 1.0)
    assert harness.resident() == {"x"}
    harness.check_all_ended()


def loading_ahead(scheduler: Scheduler) -> set[str]:
    """Returns the contents whose loads began before a request reserved them."""
    return scheduler._admission._loading_ahead


def pages_in_the_way(harness: Harness, head: Request, waited: dict[str, set[Request]]) -> int:
    """Returns the pages of loads ahead for others if nothing else keeps `head` from starting.

    `waited` holds the requests that waited already when such a load began.
    """
    scheduler = harness.scheduler
    memory = scheduler.memory
    ahead = {key for key in waited if head in waited[key]} & loading_ahead(scheduler)
    ahead -= head.versions.keys()
    in_the_way = sum(len(a.page_ids) for a in memory.adapters if a.content_hash in ahead)
    needed = memory.kv.num_pages_for(len(head.token_ids)) + len(scheduler.running)
    missing = [v for h, v in head.versions.items() if not memory.adapters.get(h)]
    needed += sum(version.num_pages for version in missing)
    return in_the_way if needed <= memory.num_available + in_the_way else 0


@pytest.mark.parametrize("seed", range(12))
def test_no_load_ahead_delays_who_could_run_or_costs_one_its_pages(seed: int) -> None:
    """Loads take three steps."""
    rng = random.Random(seed)
    harness = make(num_pages=30, max_num_seqs=rng.choice([4, 6]), max_adapter_slots=16)
    for index in range(10):
        harness.register(str(index), num_pages=rng.randint(1, 4))
        harness.scheduler.load_adapter(str(index), AdapterSource.at(f"/{index}/{index}"), index)
    harness.settle()
    due: deque[float] = deque()
    waited: dict[str, set[Request]] = {}
    num_short = 0
    for _ in range(250):
        if rng.random() < 0.5:
            harness.add(
                len(harness.expected),
                [rng.randrange(9) for _ in range(rng.randint(1, 40))],
                adapter=rng.choice(["", *map(str, range(10))]),
                max_tokens=rng.randint(1, 20),
            )
        scheduler = harness.scheduler
        num_before, ahead = scheduler.stats()["num_preemptions"], loading_ahead(scheduler)
        is_loading = bool(ahead)
        harness.plan()
        if is_loading:
            assert scheduler.stats()["num_preemptions"] == num_before
        waiting = scheduler.waiting.by_age
        if waiting and waiting[0].admitted_at < 0 and scheduler.running.has_free_slot:
            num_short += 1
            assert not pages_in_the_way(harness, waiting[0], waited)
        waited = {key: waited.get(key) or set(waiting) for key in ahead}
        due.extend([harness.now + 3.0] * (len(harness.events) - len(due)))
        harness.now += 1.0
        if harness.results:
            harness.commit()
        while due and due[0] <= harness.now:
            due.popleft()
            harness.deliver_event()
    assert num_short > 5
    assert prefetches(harness) > 0
    serve(harness, 2.0)
    harness.check_all_ended()
