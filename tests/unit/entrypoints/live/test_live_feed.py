"""The live view, against figures that were worked out by hand."""

from typing import Any

import pytest

from loraplex.entrypoints.live.adapter_rows import MAX_ROWS
from loraplex.entrypoints.live.live_feed import LISTED_PER_SECOND, LiveFeed

BUCKETS = [*(str(512 << i) for i in range(19)), "+Inf"]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def stats(*, tokens: int = 0, first: dict[int, int] | None = None, **values: Any) -> dict[str, Any]:
    """Statistics with `first` tokens by the number of their bucket."""
    counts = dict.fromkeys(BUCKETS, 0) | {BUCKETS[i]: n for i, n in (first or {}).items()}
    return {"num_generated_tokens": tokens, "first_tokens_by_us": counts, **values}


def listed(name: str, tier: str = "disk", *, content: str = "", **values: Any) -> dict[str, Any]:
    return {"name": name, "tier": tier, "content_hash": content or name, "usage": {}, **values}


def resident(content: str, slot: int, *, state: str = "resident", users: int = 0) -> dict[str, Any]:
    return {
        "content_hash": content, "names": [content], "adapter_slot": slot, "num_pages": 2,
        "residency": state, "pinned": False, "num_users": users,
    }  # fmt: skip


def test_rates_are_over_the_last_seconds() -> None:
    clock = Clock()
    feed = LiveFeed("base", clock=clock)
    feed.add_stats(stats(tokens=1_000_000))
    assert feed.view()["rates"]["generated_tokens"] == 0
    seen = []
    for tokens in (100, 200, 300, 400, 500, 500, 500, 500, 500):
        clock.now += 0.5
        feed.add_stats(stats(tokens=1_000_000 + tokens))
        seen.append(feed.view()["rates"]["generated_tokens"])
    assert seen == [200, 200, 200, 200, 200, 150, 100, 50, 0]


def test_counters_that_fall_give_no_negative_rate() -> None:
    """An engine of a cluster has left, so the sums are smaller."""
    clock = Clock()
    feed = LiveFeed("base", clock=clock)
    feed.add_stats(stats(tokens=500, first={3: 9}))
    clock.now += 1
    feed.add_stats(stats(tokens=20, first={3: 2, 4: 1}))
    assert feed.view()["rates"]["generated_tokens"] == 0
    assert feed.view()["first_token"]["count"] == 1


def test_percentiles_are_those_of_the_last_minute() -> None:
    clock = Clock()
    feed = LiveFeed("base", clock=clock)
    old = {0: 1000}
    feed.add_stats(stats(first=old))
    assert feed.view()["first_token"]["window_s"] is None
    assert feed.view()["first_token"]["p50_ms"] == pytest.approx(0.26, abs=0.01)
    clock.now += 10
    feed.add_stats(stats(first=old | {6: 50, 10: 50}))
    shown = feed.view()["first_token"]
    assert (shown["window_s"], shown["count"]) == (10, 100)
    assert shown["p50_ms"] == pytest.approx(32.77, abs=0.01)  # the end of bucket 6
    assert 262 < shown["p90_ms"] < shown["p99_ms"] < 525  # in bucket 10
    for _ in range(7):
        clock.now += 10
        feed.add_stats(stats(first=old | {6: 50, 10: 50}))
    assert feed.view()["first_token"]["count"] == 1100  # none in the last minute: all of them


def test_tiers_are_as_new_as_the_statistics() -> None:
    feed = LiveFeed("base", clock=Clock())
    feed.add_list([
        listed("evicted", "pages"), listed("came", "host"), listed("comes"), listed("cold"),
        listed("twin", content="came"),
    ])  # fmt: skip
    feed.add_stats(
        stats(
            resident_adapters=[resident("came", 5, users=3), resident("comes", 0, state="loading")],
            pools=[{"engine": "", "num_pages": 9, "pages_per_cell": 1, "runs": [0, 9]}],
        )
    )
    view = feed.view()
    assert [(row["name"], row["tier"], row["num_users"]) for row in view["adapters"]] == [
        ("came", "pages", 3), ("twin", "pages", 3), ("comes", "loading", 0), ("evicted", "host", 0),
        ("cold", "disk", 0),
    ]  # fmt: skip
    (pool,) = view["pools"]
    assert sorted(pool["slots"]) == ["0", "5"]
    assert pool["slots"]["5"]["names"] == ["came"]


def test_slots_belong_to_the_engine_of_their_pool() -> None:
    feed = LiveFeed("base", clock=Clock())
    rows = [{**resident(name, 1), "engine": engine} for name, engine in (("a", "e1"), ("b", "e2"))]
    pools = [
        {"engine": engine, "num_pages": 9, "pages_per_cell": 1, "runs": []}
        for engine in ("e1", "e2")
    ]
    feed.add_stats(stats(resident_adapters=rows, pools=pools))
    assert [pool["slots"]["1"]["names"] for pool in feed.view()["pools"]] == [["a"], ["b"]]


def test_rows_are_bounded_and_the_list_is_asked_for_seldomer() -> None:
    clock = Clock()
    feed = LiveFeed("base", clock=clock)
    assert feed.needs_list
    feed.add_list([listed(f"n{i:05}", "host" if i == 9_999 else "disk") for i in range(10_000)])
    feed.add_stats(stats(registered_adapters=10_000))
    view = feed.view()
    assert len(view["adapters"]) == MAX_ROWS
    assert view["num_adapters_left_out"] == 10_000 - MAX_ROWS
    assert view["adapters"][0]["name"] == "n09999"
    clock.now += 10_000 / LISTED_PER_SECOND - 1
    assert not feed.needs_list
    feed.add_stats(stats(registered_adapters=10_001))
    clock.now += 1
    assert feed.needs_list


def test_an_adapter_that_was_sent_as_tensors_has_a_row() -> None:
    feed = LiveFeed("base")
    feed.add_list([listed("sent", "memory"), listed("read", "disk")])
    feed.add_stats(stats())
    assert [(row["name"], row["tier"]) for row in feed.view()["adapters"]] == [
        ("read", "disk"), ("sent", "memory"),
    ]  # fmt: skip


def test_requests_that_wait_in_the_routers_of_a_cluster_wait() -> None:
    feed = LiveFeed("base")
    feed.add_stats(stats(running=64, waiting=2, router={"waiting": 40}))
    assert feed.view()["load"]["waiting"] == 42
