"""Requests of several adapters: all of them are reserved and loaded, or none."""

import random
from array import array

import pytest

from loraplex.scheduler.frontend_protocol import MixPart
from loraplex.scheduler.request import Request, RequestRefused
from loraplex.scheduler.worker_protocol import InspectAdapter, LoadAdapter

from helpers.fakes.fake_model import sampling_spec
from helpers.scheduling.policy_queue import PolicyQueue
from helpers.scheduling.scheduler_harness import Harness

PROMPT = [1, 2, 3, 4, 5, 6]


def make(names: str = "abcd", **options: object) -> Harness:
    harness = Harness(**options)
    for name in names:
        harness.register(name, num_pages=2)
    return harness


def loads(harness: Harness) -> list[str]:
    """Contents that a plan has loaded; the worker does so at once."""
    commands = harness.scheduler.take_commands()
    for command in commands:
        if isinstance(command, LoadAdapter):
            harness.events.append(harness.worker.load(command))
        else:
            harness.events.append(harness.worker.inspect(command))
    return [c.content_hash for c in commands if isinstance(c, LoadAdapter)]


def test_all_adapters_are_loaded_at_once_and_the_request_waits_for_the_last() -> None:
    harness = make()
    harness.add("mix", PROMPT, mix={"a": 0.5, "b": 1.0, "c": -1.0})
    harness.settle()
    assert harness.scheduler.plan() is None
    assert loads(harness) == ["a", "b", "c"]
    for _ in range(2):
        harness.deliver_event()
        assert harness.plan() is None, "it starts before its last adapter is there"
    harness.deliver_event()
    plan = harness.plan()
    assert plan is not None
    (new,) = plan.new_requests
    assert [(b.weight, b.first_position) for b in new.bindings] == [(0.5, 0), (1.0, 0), (-1.0, 0)]
    harness.run()


def test_statistics_show_bindings_kinds_and_bytes() -> None:
    harness = make()
    harness.register("d", num_pages=2, kind="dora")
    harness.add("mix", PROMPT, mix={"a": 0.5, "b": 1.0}, max_tokens=20)
    harness.add("dora", PROMPT, adapter="d", max_tokens=20)
    harness.add("base", PROMPT, max_tokens=20)
    while (stats := harness.scheduler.stats())["running"] < 3:
        assert harness.turn(), "they never run together"
    assert (stats["running_bindings"], stats["running_mixes"]) == (3, 1)
    rows = {row["content_hash"]: row for row in harness.list_resident()}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "a": "lora",
        "b": "lora",
        "d": "dora",
    }
    assert all(row["num_bytes"] > 0 for row in rows.values())
    harness.run()
    assert harness.scheduler.stats()["running_bindings"] == 0


def test_two_mixes_do_not_hold_each_others_slots() -> None:
    harness = make(max_adapter_slots=3)
    harness.add("one", PROMPT, mix={"a": 1.0, "b": 1.0}, max_tokens=4)
    harness.add("two", PROMPT, mix={"c": 1.0, "d": 1.0}, max_tokens=4)
    harness.add("base", PROMPT, max_tokens=4)
    harness.settle()
    assert harness.plan() is not None  # the base request
    users = {row["content_hash"]: row["num_users"] for row in harness.list_resident()}
    users.pop("c", None)  # loaded ahead into the free slot, which reserves it for nobody
    assert users == {"a": 1, "b": 1}
    harness.run()
    assert {"c", "d"} <= harness.resident()


def test_a_resident_adapter_is_not_evicted_for_the_others_of_its_mix() -> None:
    harness = make(max_adapter_slots=2)
    harness.add("a alone", PROMPT, adapter="a", max_tokens=1)
    harness.run()
    harness.add("b alone", PROMPT, adapter="b", max_tokens=1)
    harness.run()
    harness.add("mix", PROMPT, mix={"a": 1.0, "c": 1.0})  # a is the first to be evicted
    harness.run()
    assert harness.resident() == {"a", "c"}
    assert harness.worker.num_loads == 3


def test_a_load_for_another_request_is_awaited() -> None:
    harness = make()
    harness.add("alone", PROMPT, adapter="a", max_tokens=2)
    harness.settle()
    assert harness.scheduler.plan() is None
    assert loads(harness) == ["a"]
    harness.add("mix", PROMPT, mix={"a": 1.0, "b": 1.0}, max_tokens=2)
    harness.events.rotate(1)
    harness.run()


@pytest.mark.parametrize("broken", ["a", "b", "c"])
@pytest.mark.parametrize("seed", range(4))
def test_a_failing_adapter_fails_the_request_by_name(broken: str, seed: int) -> None:
    """The others keep their pages, and a later request uses them."""
    rng = random.Random(seed)
    harness = make()
    for name in "abc":
        harness.add(f"warm {name}", PROMPT, adapter=name, max_tokens=1)
    harness.settle()
    path = harness.listed()[broken]["path"]
    harness.add("mix", PROMPT, mix={"c": 1.0, "b": 1.0, "a": 1.0})
    harness.files[path].error = "it is gone"
    while harness.scheduler.num_unfinished:
        harness.plan()
        harness.events.rotate(rng.randrange(3))
        harness.turn()
    code, text = harness.error_of("mix")
    assert code == "adapter" and f"{broken!r}" in text
    harness.files[path].error = ""
    rest = {name: 1.0 for name in "abc" if name != broken}
    harness.add("rest", PROMPT, mix=rest)
    harness.run()
    assert harness.expected["rest"].end.finish_reason == "length"


def test_a_file_that_cannot_be_read_fails_the_mix_before_the_others_are_read() -> None:
    harness = make()
    harness.register("bad", error="no such file")
    harness.add("mix", PROMPT, mix={"a": 1.0, "bad": 1.0})
    harness.send_commands()
    harness.events.rotate(1)  # the answer for `bad` comes first
    harness.deliver_event()
    assert harness.error_of("mix")[0] == "adapter"
    assert "'bad'" in harness.error_of("mix")[1]
    harness.run()


def test_a_command_without_an_answer_fails_the_mixes_that_wait_for_it() -> None:
    """Also one that waits for another adapter first."""
    harness = make()
    harness.add("mix", PROMPT, mix={"a": 1.0, "b": 1.0})
    harness.add("alone", PROMPT, adapter="a")
    read = InspectAdapter("b", harness.listed()["b"]["path"])
    harness.scheduler.fail_waiting(read, "worker rank 1 hangs")
    harness.take_updates()
    code, text = harness.error_of("mix")
    assert code == "adapter" and "'b'" in text and "worker rank 1 hangs" in text
    harness.settle()
    harness.add("again", PROMPT, mix={"c": 1.0, "d": 1.0})
    harness.settle()
    assert harness.scheduler.plan() is None
    commands = harness.scheduler.take_commands()
    load = next(c for c in commands if isinstance(c, LoadAdapter) and c.content_hash == "d")
    harness.scheduler.fail_waiting(load, "worker rank 1 hangs")
    harness.take_updates()
    assert "'d'" in harness.error_of("again")[1]
    harness.events.extend(harness.worker.load(command) for command in commands)
    harness.run()


def test_what_is_refused() -> None:
    harness = make("abcdefghi", max_adapter_slots=2, num_pages=20)
    spec = sampling_spec()

    def refusal(**options: object) -> str:
        with pytest.raises(RequestRefused) as refused:
            harness.scheduler.add(Request(1, array("i", PROMPT), spec, adapter="x", **options))
        return refused.value.text

    assert "may mix 8 adapters, this one names 9" in refusal(mix=[MixPart(n) for n in "abcdefghi"])
    assert "'nobody'" in refusal(mix=[MixPart("a"), MixPart("nobody")])
    for name in "abc":
        harness.add(name, PROMPT, adapter=name, max_tokens=1)
        harness.run()
    text = refusal(mix=[MixPart(n) for n in "abc"])
    assert "mixes 3 adapters, but 2 adapter slots" in text
    harness.verify()


def test_a_pin_leaves_a_mix_its_slots() -> None:
    harness = make(max_adapter_slots=3)
    harness.add("mix", PROMPT, mix={"a": 1.0, "b": 1.0, "c": 1.0}, max_tokens=20)
    for _ in range(8):
        harness.turn()
    harness.scheduler.pin_adapter("d", 1)
    harness.run()
    assert "an unfinished request needs" in harness.adapter_updates[1].error
    harness.scheduler.pin_adapter("d", 2)
    assert harness.scheduler.adapters.take_updates()[0].error == ""
    assert harness.try_add("again", PROMPT, mix={"a": 1.0, "b": 1.0, "c": 1.0}) == "bad_request"
    harness.add("with the pinned one", PROMPT, mix={"a": 1.0, "b": 1.0, "d": 1.0})
    harness.run()


def test_a_mix_counts_once_in_all_and_once_for_each_adapter() -> None:
    harness = make()
    harness.add("mix", PROMPT, mix={"a": 0.5, "b": 2.0}, max_tokens=3)
    harness.run()
    listed, stats = harness.listed(), harness.scheduler.stats()
    assert [listed[name]["usage"]["num_ended"] for name in "ab"] == [1, 1]
    assert stats["adapter_usage"]["num_ended"] == 1
    assert stats["adapter_usage"]["num_generated_tokens"] == 3
    assert listed["a"]["num_requests"] == 0 and harness.resident() == {"a", "b"}


def test_clustering_counts_the_union_of_the_adapters() -> None:
    queue = PolicyQueue("cluster", max_adapters_per_batch=2, max_wait_s=1000.0)
    for at, (name, adapter) in enumerate(
        [("1", "a+b"), ("2", "c"), ("3", "b+a"), ("4", "b"), ("5", "b+c"), ("6", "")]
    ):
        queue.add(name, adapter=adapter, at=float(at))
    assert queue.admit(1, now=10.0) == "1"
    assert queue.admit(5, now=10.0) == "3 4 6 2 5"


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("mix", [{"a": 1.0, "d": 1.0}, {"d": 0.5}])
def test_only_plain_lora_may_be_mixed(mix: dict[str, float], is_known: bool) -> None:
    harness = make("a")
    harness.register("d", num_pages=2, kind="dora")
    if is_known:
        harness.add("alone", PROMPT, adapter="d")
        harness.run()
        end = harness.expected["alone"].end
        assert end is not None and end.finish_reason == "length"
        assert harness.try_add("mix", PROMPT, mix=mix) == "bad_request"
        return
    harness.add("mix", PROMPT, mix=mix)
    harness.settle()
    code, text = harness.error_of("mix")
    assert code == "bad_request" and "'d' is of the kind dora" in text
