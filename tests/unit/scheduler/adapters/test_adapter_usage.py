"""list_adapters() and stats(): tiers, users, and the service of each name."""

import random
import statistics
import tracemalloc

import pytest

from loraplex.scheduler.adapters.usage import Usage
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused

from helpers.scheduling.scheduler_harness import Harness


def test_tiers_and_hits_follow_the_weights() -> None:
    harness = Harness(max_adapter_slots=1)
    harness.worker.max_host = 2
    for name in "abc":
        harness.register(name)
    assert harness.listed()["a"]["tier"] == "disk"
    for index, name in enumerate(["a", "a", "b", "a", "b", "c", "a"]):
        harness.add(index, [1], adapter=name, max_tokens=1)
        harness.run()
    # a: read, resident, -, copied, -, -, gone from the host store when c was read
    assert harness.listed()["a"]["usage"]["hits"] == {"pages": 1, "host": 1, "disk": 2}
    assert harness.listed()["b"]["usage"]["hits"] == {"pages": 0, "host": 1, "disk": 1}
    tiers = {name: info["tier"] for name, info in harness.listed().items()}
    assert tiers == {"a": "pages", "b": "disk", "c": "host"}
    total = harness.scheduler.stats()["adapter_usage"]
    assert total["hits"] == {"pages": 1, "host": 2, "disk": 4}
    assert total["num_loads"] == harness.worker.num_loads == 6


def test_users_and_last_use() -> None:
    harness = Harness(max_num_seqs=2)
    harness.register("a")
    harness.register("same", "a")
    assert harness.listed()["a"]["seconds_since_use"] is None
    for index in range(3):
        harness.add(index, [1, 2], adapter="a", max_tokens=12)
    harness.add("other", [3], adapter="same", max_tokens=12)
    while harness.listed()["a"]["num_running"] < 2:
        harness.turn()
    info = harness.listed()["a"]
    assert (info["num_requests"], info["num_running"], info["num_waiting"]) == (3, 2, 1)
    assert (info["num_users"], info["seconds_since_use"]) == (2, 0.0)
    alone = harness.scheduler.adapters.describe_one("same")
    assert (alone["num_waiting"], alone["num_users"], alone["tier"]) == (1, 2, "pages")
    harness.run()
    harness.now += 5.0
    assert harness.listed()["a"]["seconds_since_use"] >= 5.0
    with pytest.raises(RequestRefused, match="known: a, same"):
        harness.scheduler.adapters.describe_one("nobody")


def test_counts_of_a_name_through_its_versions() -> None:
    harness = Harness()
    harness.register("a", "version 1")
    harness.add("one", [1, 2, 3], adapter="a", max_tokens=4)
    harness.add("base", [1], max_tokens=2)
    harness.run()
    harness.register("a", "version 2")
    harness.add("two", [1, 2], adapter="a", max_tokens=5)
    harness.run()
    harness.add("cancelled", [1, 2], adapter="a")
    harness.abort("cancelled")
    service = harness.listed()["a"]["usage"]
    assert (service["num_requests"], service["num_ended"], service["num_first_tokens"]) == (3, 3, 2)
    assert (service["num_prompt_tokens"], service["num_generated_tokens"]) == (5, 9)
    assert (service["num_loads"], service["num_load_failures"]) == (2, 0)
    assert service["ttft_mean_ms"] > 0
    assert harness.scheduler.stats()["base_usage"]["num_generated_tokens"] == 2
    harness.scheduler.unload_adapter("a")
    harness.register("a", "version 3")
    assert harness.listed()["a"]["usage"] == {}, "a name that was unloaded starts anew"


def test_a_first_token_counts_once_however_it_comes() -> None:
    """Prompts in chunks that leave one token, preemptions, prompts of one token."""
    harness = Harness(num_pages=9, block_tokens=2, max_num_batched_tokens=8, max_num_seqs=4)
    for index in range(8):
        harness.add(index, [1] * (1 + index % 9), max_tokens=7)
    harness.run()
    stats = harness.scheduler.stats()
    assert stats["num_preemptions"] > 0
    service = stats["base_usage"]
    assert service["num_first_tokens"] == service["hits"]["pages"] == 8
    assert service["num_prompt_tokens"] == sum(1 + index % 9 for index in range(8))


def test_quantiles_are_in_the_bucket_of_the_true_ones() -> None:
    rng = random.Random(0)
    for scale in (1e2, 1e4, 1e6):
        service = Usage()
        values = [int(rng.expovariate(1 / scale)) for _ in range(5000)]
        for value in values:
            service.add_first_token(1, value, 0)
        cuts = statistics.quantiles(values, n=100)
        for share, cut in ((0.5, cuts[49]), (0.99, cuts[98])):
            estimate = service.ttft_quantile_ms(share) * 1e3
            assert estimate <= max(512, 2 * cut) and cut <= max(512, 2 * estimate)
        assert service.snapshot()["ttft_mean_ms"] == pytest.approx(statistics.fmean(values) / 1e3)
    assert Usage().ttft_quantile_ms(0.5) == 0.0
    late = Usage()
    late.add_first_token(1, 10**15, 2)  # beyond the last bucket
    assert 0 < late.ttft_quantile_ms(0.99) < 1e6


def test_ten_thousand_names_that_all_served_take_little_memory() -> None:
    harness = Harness(check=False)
    tracemalloc.start()
    for index in range(10_000):
        harness.scheduler.register_adapter(
            f"adapter-{index}", AdapterSource.at(f"/srv/adapters/adapter-{index}")
        )
    registered, _ = tracemalloc.get_traced_memory()
    for version in harness.scheduler.adapters.registry:
        version.usage = Usage()
        version.usage.add_first_token(100, 5000, 1)
    served, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert registered < 12 << 20 and served - registered < 8 << 20, (registered, served)


def test_a_content_leaves_the_host_store_with_its_last_reference() -> None:
    harness = Harness()
    harness.worker.max_host = 10
    for name, content in (("a", "x"), ("same", "x"), ("b", "y")):
        harness.register(name, content)
        harness.add(name, [1], adapter=name, max_tokens=12)
    while not all(harness.expected[name].token_ids for name in ("a", "same", "b")):
        harness.turn()
    harness.scheduler.unload_adapter("a")
    harness.scheduler.unload_adapter("b")
    harness.send_commands()
    assert set(harness.worker.host) == {"x", "y"}, "requests still use them"
    harness.run()
    harness.send_commands()
    assert set(harness.worker.host) == {"x"} and harness.resident() == {"x"}
    harness.scheduler.unload_adapter("same")
    harness.send_commands()
    assert not harness.worker.host and harness.resident() == set()
    assert harness.scheduler.stats()["host_adapters"] == 0


def test_what_nobody_can_use_does_not_stay_on_the_host() -> None:
    """Read for a name that is gone by then, replaced meanwhile, or too large for the pool."""
    harness = Harness(num_pages=9)
    harness.worker.max_host = 10
    for path, num_pages in (("/gone", 1), ("/old", 1), ("/new", 1), ("/large", 8)):
        harness.file(path, path, num_pages)
    harness.scheduler.load_adapter("a", AdapterSource.at("/gone"), 1)
    harness.scheduler.unload_adapter("a")
    harness.scheduler.load_adapter("b", AdapterSource.at("/old"), 2)
    harness.scheduler.load_adapter("b", AdapterSource.at("/new"), 3)
    harness.scheduler.load_adapter("c", AdapterSource.at("/large"), 4)
    harness.settle()
    assert "enlarge the pool" in harness.adapter_updates[4].error
    harness.send_commands()
    assert set(harness.worker.host) == {"/new"}


def test_a_bad_replacement_of_one_that_was_never_read_leaves_it() -> None:
    harness = Harness()
    harness.register("a", "good")
    harness.file("/bad", "", error="it is damaged")
    harness.scheduler.load_adapter("a", AdapterSource.at("/bad"), "key")
    harness.add("meanwhile", [1], adapter="a", max_tokens=2)
    harness.settle()
    assert "it is damaged" in harness.adapter_updates["key"].error
    harness.add("after", [1], adapter="a", max_tokens=2)
    harness.run()
    assert harness.listed()["a"]["state"] == "ready"
    assert all(expectation.end for expectation in harness.expected.values())
