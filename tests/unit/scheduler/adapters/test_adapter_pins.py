"""Pinned adapters: they stay in pages, take no more than their share, and starve no request."""

import pytest

from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused

from helpers.scheduling.scheduler_harness import Harness


def pin(harness: Harness, name: str) -> str:
    """Returns why not."""
    key = f"pin {name} {len(harness.adapter_updates)}"
    harness.scheduler.pin_adapter(name, key)
    harness.send_commands()
    while key not in harness.adapter_updates:
        harness.take_updates()
        if key not in harness.adapter_updates:
            harness.deliver_event()
    harness.verify()
    return str(harness.adapter_updates[key].error)


def serve(harness: Harness, *names: str) -> None:
    for name in names:
        harness.add((name, harness.now, len(harness.plans)), [1, 2], adapter=name, max_tokens=2)
        harness.run()


def test_a_pinned_adapter_is_loaded_unasked_and_outlives_all_others() -> None:
    harness = Harness(max_adapter_slots=4)
    for name in "abcdefgh":
        harness.register(name)
    assert pin(harness, "a") == ""
    assert harness.resident() == set()
    assert harness.plan() is None
    harness.settle()
    assert harness.plan() is None
    info = harness.listed()["a"]
    assert (info["tier"], info["pinned"], info["num_users"]) == ("pages", True, 0)
    for name in "bcdefgh":
        serve(harness, name)
        assert "a" in harness.resident()
    assert harness.scheduler.stats()["pages_pinned"] == 1
    assert not harness.scheduler.unpin_adapter("a")["pinned"]
    serve(harness, *"bcdefgh")
    assert "a" not in harness.resident()
    assert not harness.scheduler.unpin_adapter("a")["pinned"], "idempotent"
    harness.check_all_ended()


def test_pin_of_a_resident_one_needs_no_load() -> None:
    harness = Harness()
    harness.register("a")
    serve(harness, "a")
    assert pin(harness, "a") == "" and pin(harness, "a") == ""
    harness.plan()
    harness.settle()
    assert harness.worker.num_loads == 1
    assert harness.scheduler.stats()["pinned_adapters"] == 1


def test_the_share_is_bounded_in_pages_and_in_slots() -> None:
    harness = Harness(num_pages=21, max_adapter_slots=4)
    for name, num_pages in (("a", 6), ("b", 5), ("c", 4), ("d", 1)):
        harness.register(name, num_pages=num_pages)
    harness.register("same", "a", num_pages=6)
    assert pin(harness, "a") == ""
    assert "6 of the 10 pages for pinned adapters are taken" in pin(harness, "b")
    assert pin(harness, "same") == "", "equal content takes its pages once"
    assert pin(harness, "c") == ""
    harness.scheduler.unpin_adapter("a")
    assert "2 of the adapter slots" in pin(harness, "d") or "are taken" in pin(harness, "d")
    harness.scheduler.unpin_adapter("same")
    assert pin(harness, "b") == ""
    harness.scheduler.unpin_adapter("b")
    harness.scheduler.unpin_adapter("c")
    assert harness.scheduler.stats()["pages_pinned"] == 0


def test_slots_are_bounded() -> None:
    harness = Harness(max_adapter_slots=4)
    for name in "abc":
        harness.register(name)
    assert pin(harness, "a") == "" and pin(harness, "b") == ""
    assert "pinned adapters may take 2 of the adapter slots" in pin(harness, "c")
    tiny = Harness(max_adapter_slots=1)
    tiny.register("a")
    assert "may take 0 of the adapter slots" in pin(tiny, "a")


def test_no_pin_takes_the_room_of_a_request_and_no_request_that_of_a_pin() -> None:
    harness = Harness(num_pages=13, block_tokens=4, max_model_len=48)
    harness.register("a", num_pages=4)
    harness.register("x", num_pages=1)
    harness.add("large", [1] * 30, adapter="x", max_tokens=10)  # 10 pages of KV and 1
    assert "an unfinished request needs so much" in pin(harness, "a")
    harness.run()
    assert pin(harness, "a") == ""
    code = harness.try_add("too large", [1] * 30, adapter="x", max_tokens=10)
    assert code == "bad_request"
    with pytest.raises(RequestRefused, match="has 8 beside 4 of pinned adapters"):
        harness.add("too large", [1] * 30, adapter="x", max_tokens=10)
    harness.add("its own", [1] * 26, adapter="a", max_tokens=6)  # 8 pages of KV beside itself
    harness.add("fits", [1] * 26, max_tokens=6)
    harness.run()


def test_pins_that_cannot_be() -> None:
    harness = Harness()
    with pytest.raises(RequestRefused, match="no adapter is registered as 'nobody'"):
        harness.scheduler.pin_adapter("nobody", "key")
    with pytest.raises(RequestRefused, match="no adapter is registered as 'nobody'"):
        harness.scheduler.unpin_adapter("nobody")
    harness.register("broken", error="it is damaged")
    assert "it is damaged" in pin(harness, "broken")
    with pytest.raises(RequestRefused, match="load it again"):
        harness.scheduler.pin_adapter("broken", "key")
    harness.register("a")
    harness.scheduler.pin_adapter("a", "too soon")
    harness.scheduler.unpin_adapter("a")
    harness.scheduler.pin_adapter("a", "gone")
    harness.scheduler.unload_adapter("a")
    harness.settle()
    assert "was unpinned while" in harness.adapter_updates["too soon"].error
    assert "was unloaded" in harness.adapter_updates["gone"].error
    assert harness.scheduler.stats()["pinned_adapters"] == 0


def test_a_pin_follows_the_name_to_its_next_version() -> None:
    harness = Harness()
    harness.register("a", "version 1")
    assert pin(harness, "a") == ""
    harness.plan()
    harness.settle()
    harness.file("/v2", "version 2", 2)
    harness.scheduler.load_adapter("a", AdapterSource.at("/v2"), "load")
    harness.settle()
    assert harness.adapter_updates["load"].adapter["pinned"]
    harness.plan()
    harness.settle()
    assert harness.resident() == {"version 2"}
    harness.register("a", "version 3")  # read for the pin's sake
    harness.settle()
    harness.plan()
    harness.settle()
    assert harness.resident() == {"version 3"} and harness.listed()["a"]["pinned"]
    harness.file("/large", "version 4", 40)  # more than the share
    harness.scheduler.load_adapter("a", AdapterSource.at("/large"), "large")
    harness.settle()
    assert harness.adapter_updates["large"].error == ""
    assert not harness.adapter_updates["large"].adapter["pinned"]
    assert harness.scheduler.stats()["pages_pinned"] == 0


def test_a_pinned_adapter_whose_load_fails_is_pinned_no_longer() -> None:
    harness = Harness()
    harness.register("a")
    assert pin(harness, "a") == ""
    harness.files[harness.listed()["a"]["path"]].error = "it is gone"
    harness.plan()
    harness.settle()
    info = harness.listed()["a"]
    assert (info["state"], info["pinned"], info["error"]) == ("registered", False, "it is gone")
    assert harness.scheduler.stats()["pages_pinned"] == 0


def test_unload_of_a_pinned_adapter_frees_it() -> None:
    harness = Harness()
    harness.worker.max_host = 10
    harness.register("a")
    assert pin(harness, "a") == ""
    harness.plan()
    harness.settle()
    assert set(harness.worker.host) == {"a"}
    harness.scheduler.unload_adapter("a")
    harness.settle()
    assert not harness.worker.host and harness.resident() == set()
