"""The pool split into fixed adapter slots and KV, as a benchmark compares it with one pool."""

from typing import Any

import pytest

from helpers.scheduling.memory_harness import MemoryHarness


def make(**options: Any) -> MemoryHarness:
    """Two slots of six pages, and nineteen pages of four tokens."""
    return MemoryHarness(
        {"fixed_adapter_slots": 2}, max_adapter_pages=6, max_model_len=100, num_pages=32, **options
    )


def test_adapter_takes_a_slot_and_nothing_of_kv() -> None:
    harness = make()
    harness.register("x", num_pages=2)
    harness.add("a", [1] * 70, adapter="x", max_tokens=7)  # all 19 pages
    harness.run()
    assert harness.expected["a"].end is not None
    assert harness.try_add("b", [1] * 70, adapter="x", max_tokens=8) == "bad_request"


def test_unused_slots_help_nobody() -> None:
    harness = make()
    harness.add("a", [1] * 40, max_tokens=1)
    harness.add("b", [2] * 40, max_tokens=1)  # 20 pages together
    harness.plan()
    assert harness.scheduler.stats()["running"] == 1
    assert harness.scheduler.stats()["pages_free"] == 21
    harness.run()


def test_idle_adapters_stay_however_short_kv_is() -> None:
    harness = make(enable_prefix_caching=False)
    harness.register("x", num_pages=1)
    harness.add("a", [1], adapter="x", max_tokens=1)
    harness.run()
    for index in range(3):
        harness.add(index, [index] * 30, max_tokens=30)
    harness.run()
    assert harness.scheduler.stats()["num_preemptions"] > 0
    assert harness.resident() == {"x"}


def test_third_adapter_waits_for_a_slot_or_takes_an_idle_one() -> None:
    harness = make()
    for name in "xyz":
        harness.register(name, num_pages=1)
        harness.add(name, [1], adapter=name, max_tokens=5)
    most = 0
    while harness.scheduler.num_unfinished:
        assert harness.turn()
        most = max(most, len(harness.resident()))
    assert most == 2
    assert harness.worker.num_loads == 3
    harness.check_all_ended()


def test_adapter_larger_than_a_slot_is_refused_with_the_mend() -> None:
    harness = make()
    harness.register("x", num_pages=7)
    harness.add("a", [1], adapter="x", max_tokens=1)
    harness.run()
    code, text = harness.error_of("a")
    assert code == "bad_request"
    assert "a fixed adapter slot has 6; raise max_lora_rank or unset fixed_adapter_slots" in text


def test_slots_need_their_size_and_room_beside_them() -> None:
    for pages, text in ((0, "need max_adapter_pages"), (16, "leave no page for KV")):
        with pytest.raises(ValueError, match=text):
            MemoryHarness({"fixed_adapter_slots": 2}, max_adapter_pages=pages, num_pages=32)
