"""Adapters: first use, loads, failures, and what waiting for one means to others."""

import pytest

from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused
from loraplex.scheduler.worker_protocol import AdapterInspected, AdapterLoaded

from helpers.scheduling.scheduler_harness import Harness


def test_registered_adapter_is_read_on_first_use_only() -> None:
    harness = Harness()
    harness.register("x", num_pages=3)
    assert harness.scheduler.take_commands() == []
    assert harness.listed()["x"]["state"] == "registered"
    harness.add("a", [1, 2], adapter="x", max_tokens=2)
    harness.add("b", [3, 4], adapter="x", max_tokens=2)
    assert len(harness.scheduler.take_commands()) == 1
    info = AdapterInspected("x", "/x/0", content_hash="x", num_pages=3, max_rank=8)
    harness.scheduler.on_adapter_inspected(info)
    harness.run()
    assert harness.worker.num_loads == 1
    info = harness.listed()["x"]
    assert (info["state"], info["residency"], info["num_users"]) == ("ready", "resident", 0)
    assert (info["content_hash"], info["num_pages"], info["max_rank"]) == ("x", 3, 8)


def test_waiting_for_an_adapter_holds_back_nobody_else() -> None:
    harness = Harness()
    harness.register("x")
    harness.add("slow", [1], adapter="x", max_tokens=2)
    harness.add("base", [2], max_tokens=2)
    for _ in range(2):
        harness.plan()
        harness.commit()
    assert harness.expected["base"].end is not None
    assert harness.expected["slow"].end is None
    harness.run()


def test_adapter_is_held_for_the_request_that_waits_for_it() -> None:
    """Base requests go ahead while it loads and then want its pages; they preempt each other."""
    harness = Harness(num_pages=12, max_num_seqs=3)
    harness.register("x", num_pages=6)
    harness.add("waits", [1] * 8, adapter="x", max_tokens=8)
    harness.settle()
    harness.scheduler.plan()  # the load goes out
    harness.add("ahead", [2] * 4, max_tokens=25)
    harness.add("ahead too", [3] * 4, max_tokens=25)
    harness.run()
    assert harness.worker.num_loads == 1


def test_growing_request_takes_the_pages_held_for_a_later_one() -> None:
    """Before it preempts itself, and only after everyone later than the holder gave way."""
    harness = Harness(num_pages=12, max_num_seqs=2, enable_prefix_caching=False)
    harness.register("x", num_pages=6)
    harness.add("old", [1] * 4, max_tokens=33)  # grows to 9 of 11 pages
    harness.plan()
    harness.commit()
    harness.add("later", [3] * 8, adapter="x", max_tokens=2)
    harness.settle()
    harness.plan()  # x loads for `later`
    harness.add("last", [2] * 4, max_tokens=20)  # takes the second seat meanwhile
    harness.commit()
    harness.plan()
    harness.settle()
    assert harness.scheduler.stats()["running"] == 2
    gone: list[str] = []
    while harness.scheduler.num_unfinished:
        harness.turn()
        if not gone and harness.scheduler.stats()["num_preemptions"]:
            gone.append("last")
        if "x" not in harness.resident() and "x" not in gone:
            gone.append("x")
    assert gone == ["last", "x"]
    starts = [new for plan in harness.plans for new in plan.new_requests]
    assert sum(new.token_ids[0] == 1 for new in starts) == 1, "the old one never gave way"
    assert harness.worker.num_loads == 2
    harness.check_all_ended()


def test_request_earlier_by_priority_takes_a_held_adapter_away() -> None:
    harness = Harness(num_pages=12, max_num_seqs=1)
    harness.register("x", num_pages=6)
    harness.add("later", [3] * 4, adapter="x", max_tokens=1)
    harness.settle()
    assert harness.plan() is None  # x loads for `later`
    harness.settle()
    harness.add("urgent", [1] * 40, max_tokens=1, priority=-1)  # 10 of 11 pages
    harness.plan()
    assert harness.resident() == set()
    harness.run()
    assert harness.worker.num_loads == 2


def test_adapter_that_still_loads_cannot_be_taken_away() -> None:
    harness = Harness(num_pages=12, max_num_seqs=1)
    harness.register("x", num_pages=6)
    harness.add("later", [3] * 4, adapter="x", max_tokens=1)
    harness.settle()
    assert harness.plan() is None
    harness.add("urgent", [1] * 40, max_tokens=1, priority=-1)
    assert harness.plan() is None
    (info,) = harness.list_resident()
    assert (info["residency"], info["num_users"]) == ("loading", 1)
    harness.run()


def test_slots_are_short_then_only_base_requests_go_ahead() -> None:
    harness = Harness(max_adapter_slots=1)
    harness.register("x")
    harness.register("y")
    harness.add("x1", [1], adapter="x", max_tokens=9)
    harness.settle()
    harness.plan()
    harness.settle()
    harness.plan()
    harness.add("y1", [2], adapter="y", max_tokens=2)
    harness.settle()
    harness.add("x2", [3], adapter="x", max_tokens=2)
    harness.add("base", [4], max_tokens=2)
    harness.commit()
    plan = harness.plan()
    assert plan is not None
    assert [list(new.token_ids) for new in plan.new_requests] == [[4]]
    harness.run()


def test_idle_adapter_is_evicted_when_another_needs_its_slot_or_pages() -> None:
    for options in ({"max_adapter_slots": 2}, {"num_pages": 14}):
        harness = Harness(**options)
        for index, name in enumerate("xyz"):
            harness.register(name, num_pages=5)
            harness.add(index, [1], adapter=name, max_tokens=1)
            harness.run()
        assert harness.resident() == {"y", "z"}


def test_running_request_keeps_its_adapter() -> None:
    harness = Harness(num_pages=14, max_num_seqs=2)
    for name in "xy":
        harness.register(name, num_pages=5)
        harness.add(name, [1, 2, 3], adapter=name, max_tokens=14)
    harness.run()  # two adapters take 10 of 13 pages; the fake worker checks each step


@pytest.mark.parametrize("named_error", ["pickle files are refused", "wrong shapes"])
def test_unreadable_adapter_fails_those_who_wait_for_it(named_error: str) -> None:
    harness = Harness()
    harness.register("x", error=named_error)
    harness.add("a", [1], adapter="x")
    harness.add("base", [2], max_tokens=2)
    harness.run()
    code, text = harness.error_of("a")
    assert code == "adapter"
    assert named_error in text
    assert "'x'" in text
    assert harness.expected["base"].end is not None
    with pytest.raises(RequestRefused, match=named_error) as refusal:
        harness.add("b", [1], adapter="x")
    assert refusal.value.code == "adapter"


def test_mended_adapter_is_served_after_loading_it_again() -> None:
    harness = Harness()
    harness.file("/p", "", error="truncated file")
    harness.scheduler.load_adapter("x", AdapterSource.at("/p"), "first")
    harness.settle()
    assert "truncated file" in harness.adapter_updates["first"].error
    assert harness.adapter_updates["first"].error_code == "adapter"
    harness.file("/p", "good", 2)
    harness.scheduler.load_adapter("x", AdapterSource.at("/p"), "second")
    harness.add("a", [1], adapter="x", max_tokens=3)  # waits for the inspection
    harness.run()
    reply = harness.adapter_updates["second"]
    assert (reply.error, reply.adapter["state"], reply.adapter["num_pages"]) == ("", "ready", 2)


def test_registering_a_failed_path_again_gives_it_another_try() -> None:
    harness = Harness()
    harness.file("/p", "", error="not there yet")
    harness.scheduler.register_adapter("x", AdapterSource.at("/p"))
    harness.add("a", [1], adapter="x")
    harness.run()
    harness.file("/p", "good")
    harness.scheduler.register_adapter("x", AdapterSource.at("/p"))
    harness.add("b", [1], adapter="x", max_tokens=1)
    harness.run()
    assert harness.error_of("a")[0] == "adapter"


def test_failed_copy_fails_its_waiters_and_gives_the_pages_back() -> None:
    harness = Harness()
    harness.register("x", num_pages=4)
    harness.register("twin", "x", num_pages=4)  # the same content at another path
    harness.add("twin reads", [9], adapter="twin", max_tokens=1)
    harness.add("a", [1], adapter="x", max_tokens=1)
    harness.add("b", [2], adapter="x", max_tokens=1)
    harness.settle()
    harness.file("/twin/1", "", error="disk error")
    harness.run()
    assert "disk error" in harness.error_of("twin reads")[1]
    assert [harness.expected[name].end.finish_reason for name in "ab"] == ["length"] * 2  # type: ignore[union-attr]
    assert harness.worker.num_loads == 2
    assert harness.scheduler.stats()["num_adapter_load_failures"] == 1


def test_adapter_larger_than_the_pool_fails_with_the_mend() -> None:
    harness = Harness(num_pages=10)
    harness.register("x", num_pages=9)
    harness.add("a", [1], adapter="x", max_tokens=1)
    harness.run()
    code, text = harness.error_of("a")
    assert code == "adapter"
    assert "enlarge the pool" in text


def test_request_too_large_beside_its_adapter_fails_once_that_is_known() -> None:
    harness = Harness(num_pages=10)
    harness.register("x", num_pages=5)
    harness.add("a", [1] * 16, adapter="x", max_tokens=2)  # 5 pages, and 5 of the adapter: 9 exist
    harness.add("b", [1] * 16, adapter="x", max_tokens=1)
    harness.run()
    code, text = harness.error_of("a")
    assert code == "bad_request"
    assert "its adapter 5" in text
    assert harness.try_add("c", [1] * 16, adapter="x", max_tokens=2) == "bad_request"


def test_preempted_request_outlives_the_name_of_its_adapter() -> None:
    harness = Harness(num_pages=10, max_num_seqs=2)
    harness.register("x", num_pages=2)
    harness.add("old", [1, 2, 3], max_tokens=20)
    harness.add("new", [4, 5, 6], adapter="x", max_tokens=20)
    while not harness.expected["new"].token_ids:
        harness.turn()
    harness.scheduler.unload_adapter("x")
    harness.run()
    assert harness.scheduler.stats()["num_preemptions"] > 0


def test_events_that_nobody_asked_for_are_refused() -> None:
    harness = Harness()
    with pytest.raises(ValueError, match="no inspection of"):
        harness.scheduler.on_adapter_inspected(AdapterInspected("x", "/p"))
    with pytest.raises(ValueError, match="no such load was asked for"):
        harness.scheduler.on_adapter_loaded(AdapterLoaded(0, "h"))


def test_adapter_needs_a_name_and_a_path() -> None:
    harness = Harness()
    for name, path in (("", "/p"), ("x", "")):
        with pytest.raises(RequestRefused, match="a name and a path"):
            harness.scheduler.register_adapter(name, AdapterSource.at(path))


def test_thousands_registered_cost_nothing_until_used() -> None:
    harness = Harness(check=False)
    for index in range(5000):
        harness.scheduler.register_adapter(
            f"adapter-{index}", AdapterSource.at(f"/nowhere/{index}")
        )
    assert harness.scheduler.take_commands() == []
    assert harness.scheduler.stats()["pages_free"] == 63
    with pytest.raises(RequestRefused) as refusal:
        harness.add("a", [1], adapter="missing")
    assert len(refusal.value.text) < 1000


def test_passing_failure_of_the_first_read_is_tried_again_by_the_next_request() -> None:
    harness = Harness()
    harness.register("x", num_pages=2)
    harness.fail_for_now("/x/0", "the disk hangs")
    harness.add("a", [1], adapter="x")
    harness.run()
    code, text = harness.error_of("a")
    assert code == "adapter" and "the disk hangs; the next request tries again" in text
    assert harness.scheduler.adapters.describe_one("x")["state"] == "registered"
    harness.file("/x/0", "x", 2)
    harness.add("b", [1], adapter="x", max_tokens=2)
    harness.run()
    described = harness.scheduler.adapters.describe_one("x")
    assert (described["state"], described["error"]) == ("ready", "")


@pytest.mark.parametrize("is_pinned", [False, True])
def test_passing_failure_of_a_load_is_tried_again_by_the_next_request(is_pinned: bool) -> None:
    harness = Harness(num_pages=10, max_model_len=28)
    harness.register("x", num_pages=4)
    harness.add("first", [1], adapter="x", max_tokens=1)
    harness.add("large", [2] * 4, max_tokens=24)  # 7 of 9 pages: evicts the adapter
    harness.run()
    if is_pinned:
        harness.scheduler.pin_adapter("x", "pin")
    harness.fail_for_now("/x/0", "too many open files")
    harness.add("a", [1], adapter="x", max_tokens=1)
    harness.plan()
    assert harness.events, "no load was asked for"
    harness.settle()
    assert "too many open files; the next request" in harness.error_of("a")[1]
    harness.file("/x/0", "x", 4)
    harness.add("b", [1], adapter="x", max_tokens=1)
    harness.run()
    described = harness.scheduler.adapters.describe_one("x")
    assert (described["state"], described["error"]) == ("ready", "")
    assert described["pinned"] is is_pinned


def test_passing_failure_of_load_adapter_is_its_answer() -> None:
    harness = Harness()
    harness.fail_for_now("/p", "no memory")
    harness.scheduler.load_adapter("x", AdapterSource.at("/p"), "first")
    harness.settle()
    assert "no memory" in harness.adapter_updates["first"].error
    harness.file("/p", "good", 2)
    harness.add("a", [1], adapter="x", max_tokens=3)
    harness.run()
