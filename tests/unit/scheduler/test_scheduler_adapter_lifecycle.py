"""Replacing and unloading adapters under traffic."""

import pytest

from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused
from loraplex.scheduler.worker_protocol import AdapterInspected

from helpers.scheduling.scheduler_harness import Harness


def test_replacement_serves_new_requests_and_old_ones_finish_on_the_old() -> None:
    harness = Harness()
    harness.register("x", "version 1", num_pages=2)
    harness.add("old", [1], adapter="x", max_tokens=20)
    while not harness.expected["old"].token_ids:
        harness.turn()
    harness.file("/v2", "version 2", 3)
    harness.scheduler.load_adapter("x", AdapterSource.at("/v2"), "key")
    harness.add("between", [2], adapter="x", max_tokens=2)  # v2 is not known to be good yet
    harness.settle()
    harness.add("new", [3], adapter="x", max_tokens=2)
    assert harness.expected["new"].path == "/v2"
    assert harness.expected["between"].path == "/x/0"
    harness.run()  # each output is held to its own content
    assert harness.resident() == {"version 2"}, "the old content goes with its last user"


def test_broken_replacement_leaves_the_old_one_serving() -> None:
    harness = Harness()
    harness.register("x", "version 1")
    harness.add("a", [1], adapter="x", max_tokens=1)
    harness.run()
    harness.file("/v2", "", error="another base model")
    harness.scheduler.load_adapter("x", AdapterSource.at("/v2"), "key")
    harness.settle()
    assert "another base model" in harness.adapter_updates["key"].error
    harness.add("b", [1], adapter="x", max_tokens=1)
    harness.run()
    assert harness.listed()["x"]["path"] == "/x/0"


def test_unload_frees_pages_after_the_last_user() -> None:
    harness = Harness()
    harness.register("x", num_pages=4)
    harness.add("a", [1], adapter="x", max_tokens=12)
    while not harness.expected["a"].token_ids:
        harness.turn()
    harness.scheduler.unload_adapter("x")
    assert harness.try_add("b", [1], adapter="x") == "unknown_adapter"
    assert harness.resident() == {"x"}
    harness.run()
    assert harness.resident() == set()
    harness.send_commands()
    assert harness.worker.adapters == {}
    with pytest.raises(RequestRefused, match="no adapter is registered as 'x'"):
        harness.scheduler.unload_adapter("x")


def test_unload_of_an_idle_adapter_frees_its_pages_at_once() -> None:
    harness = Harness()
    harness.register("x", num_pages=4)
    harness.register("same", "x", num_pages=4)
    for name in ("x", "same"):
        harness.add(name, [1], adapter=name, max_tokens=1)
        harness.run()
    harness.scheduler.unload_adapter("x")
    assert harness.resident() == {"x"}, "another name still means this content"
    harness.scheduler.unload_adapter("same")
    assert harness.resident() == set()


def test_unload_while_it_loads_frees_the_pages_when_loaded() -> None:
    harness = Harness()
    harness.register("x", num_pages=4)
    harness.add("a", [1], adapter="x")
    harness.settle()
    assert harness.plan() is None
    harness.abort("a")
    harness.scheduler.unload_adapter("x")
    assert harness.scheduler.stats()["pages_adapter"] == 4, "the worker is still writing them"
    harness.settle()
    assert harness.scheduler.stats()["pages_adapter"] == 0
    harness.run()


def test_adapter_stays_when_its_only_waiter_left_while_it_loaded() -> None:
    harness = Harness()
    harness.register("x", num_pages=4)
    harness.add("a", [1], adapter="x")
    harness.settle()
    assert harness.plan() is None
    harness.abort("a")
    harness.settle()
    assert harness.resident() == {"x"}
    harness.add("b", [1], adapter="x", max_tokens=1)
    harness.run()
    assert harness.worker.num_loads == 1


def test_unload_while_it_is_read() -> None:
    harness = Harness()
    harness.file("/p", "x")
    harness.scheduler.load_adapter("x", AdapterSource.at("/p"), "key")
    harness.add("a", [1], adapter="x", max_tokens=2)  # accepted, so it is served
    harness.scheduler.unload_adapter("x")
    harness.run()
    assert "was unloaded while" in harness.adapter_updates["key"].error
    assert harness.listed() == {}
    assert harness.resident() == set()


def test_of_two_loads_under_way_the_later_one_wins_in_any_order() -> None:
    for order in (["/v2", "/v3"], ["/v3", "/v2"]):
        harness = Harness()
        harness.register("x", "version 1")
        harness.add("a", [1], adapter="x", max_tokens=1)
        harness.run()
        for path in ("/v2", "/v3"):
            harness.file(path, path)
            harness.scheduler.load_adapter("x", AdapterSource.at(path), path)
        harness.scheduler.take_commands()
        for path in order:
            harness.scheduler.on_adapter_inspected(
                AdapterInspected("x", path, content_hash=path, num_pages=1)
            )
            harness.take_updates()
        assert harness.listed()["x"]["path"] == "/v3"
        assert harness.adapter_updates["/v3"].error == ""
        assert ("replaced" in harness.adapter_updates["/v2"].error) == (order[0] == "/v3")
