"""The list of adapters by tier, and the counts of loads and evictions."""

from itertools import chain
from typing import Any

import pytest

from loraplex.scheduler.adapters.tiers import MAX_NAMES, NAMES_PER_SLICE, adapters_by_tier
from loraplex.scheduler.frontend_protocol import AdapterSource

from helpers.scheduling.scheduler_harness import Harness


def slices(harness: Harness) -> list[list[dict[str, Any]]]:
    scheduler = harness.scheduler
    registry = scheduler.adapters.registry
    return list(adapters_by_tier(scheduler.memory.adapters, registry, scheduler.waiting))


def tiers(harness: Harness) -> dict[str, str]:
    rows = list(chain.from_iterable(slices(harness)))
    found = {row["name"]: row["tier"] for row in rows}
    assert len(found) == len(rows), "a name came twice"
    return found


def test_each_name_is_in_the_fastest_place_that_it_has() -> None:
    harness = Harness(max_adapter_slots=2)
    for name in ("a", "b", "c", "unused"):
        harness.register(name)
    assert tiers(harness) == {}
    harness.add(1, [1], adapter="a", max_tokens=2)
    assert tiers(harness) == {"a": "queued"}
    harness.settle()
    harness.plan()
    assert tiers(harness) == {"a": "loading"}
    harness.run()
    assert tiers(harness) == {"a": "pages"}
    for number, name in enumerate(("b", "c"), start=2):
        harness.add(number, [1], adapter=name, max_tokens=2)
        harness.run()
    assert tiers(harness) == {"b": "pages", "c": "pages", "a": "host"}


def test_names_of_one_content_are_listed_each() -> None:
    harness = Harness()
    for name in ("a", "b"):
        harness.register(name, "same")
        harness.add(name, [1], adapter=name, max_tokens=2)
        harness.run()
    harness.scheduler.pin_adapter("b", "key")
    rows = list(chain.from_iterable(slices(harness)))
    assert rows == [
        {"name": "a", "tier": "pages", "pinned": False},
        {"name": "b", "tier": "pages", "pinned": True},
    ]


def test_the_list_is_bounded_and_comes_in_slices() -> None:
    harness = Harness(check=False)
    for number in range(MAX_NAMES + 500):
        name = f"adapter-{number}"
        harness.file(f"/{name}", name)
        harness.scheduler.load_adapter(name, AdapterSource.at(f"/{name}"), name)
    harness.settle()
    found = slices(harness)
    assert {len(part) for part in found[:-1]} == {NAMES_PER_SLICE}
    assert sum(map(len, found)) == MAX_NAMES
    assert harness.scheduler.stats()["host_adapters"] == MAX_NAMES + 500


def test_loads_are_counted_by_tier_and_evictions_by_kind() -> None:
    harness = Harness(num_pages=8, max_adapter_slots=1, max_model_len=12)
    for name in ("a", "b"):
        harness.register(name, num_pages=2)
        harness.add(name, [1], adapter=name, max_tokens=2)
        harness.run()
    stats = harness.scheduler.stats()
    assert stats["num_adapter_evictions"] == 1
    loads = stats["adapter_load_seconds"]
    assert loads["host"]["count"] + loads["disk"]["count"] == stats["num_adapter_loads"] == 2
    assert loads["host"]["sum"] + loads["disk"]["sum"] == pytest.approx(
        stats["adapter_load_us"] / 1e6
    )
    for number in range(4):
        harness.add(number, [10 + number] * 5, max_tokens=6)
        harness.run()
    assert harness.scheduler.stats()["num_prefix_evictions"] > 0


def test_steps_are_counted_by_their_tokens() -> None:
    harness = Harness()
    harness.add("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=3)
    harness.run()
    stats = harness.scheduler.stats()
    assert stats["step_tokens"]["sum"] == stats["num_scheduled_tokens"]
    assert stats["step_tokens"]["count"] == stats["num_steps"]
    buckets = stats["step_tokens"]["buckets"]
    assert (buckets["1.0"], buckets["8.0"], buckets["16.0"], buckets["+Inf"]) == (2, 2, 3, 3)
