"""Statistics of a cluster are those that one engine would have of the same work."""

from array import array
from pathlib import Path

from loraplex.engine.ipc.messages.frontend import (
    AdapterCommand,
    AdapterReply,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.router.request_book import RequestBook
from loraplex.engine.router.router_counts import RouterCounts
from loraplex.scheduler.adapters.usage import Usage, merge_snapshots
from loraplex.scheduler.frontend_protocol import AdapterSource, AddRequest
from loraplex.scheduler.worker_protocol import AdapterLoaded

from helpers.fakes.fake_engine import make_fake_adapter
from helpers.fakes.fake_model import sampling_spec
from helpers.running.routed_engines import RoutedEngines


def test_usage_of_all_engines_is_that_of_all_their_requests() -> None:
    parts, whole = [Usage(), Usage()], Usage()
    for i in range(40):
        for usage in (parts[i % 4 == 0], whole):
            usage.num_requests += 1
            usage.add_first_token(10 + i, 700 * (i + 1), i % 3)
            usage.add_load(AdapterLoaded(0, "", "", load_us=100 * i))
    merged, expected = merge_snapshots([part.snapshot() for part in parts]), whole.snapshot()
    quantiles = ("ttft_p50_ms", "ttft_p99_ms")
    assert {k: v for k, v in merged.items() if k not in quantiles} == {
        k: v for k, v in expected.items() if k not in quantiles
    }
    for key in quantiles:
        assert expected[key] <= merged[key] <= 1.5 * expected[key]
    assert merge_snapshots([{}, expected]) == expected
    assert merge_snapshots([{}, {}]) == {}


def test_names_count_once_and_usage_of_all_engines(tmp_path: Path) -> None:
    cluster = RoutedEngines(2, placement="least_loaded")
    cluster.turn()
    source = AdapterSource.at(str(make_fake_adapter(tmp_path / "a", "content")))
    cluster.channel.send(AdapterCommand(1, "load", "a", source, "owner"))
    while not cluster.replies:
        cluster.turn()
    for i in range(6):
        cluster.add(AddRequest(i, array("i", [i]), sampling_spec(max_tokens=3), adapter="a"))
    cluster.finish()
    cluster.replies.clear()
    cluster.channel.send(AdapterCommand(2, "list", "a"))
    cluster.channel.send(StatsQuery(3))
    while len(cluster.replies) < 3:
        cluster.turn()
    (adapters,) = [r.adapters for r in cluster.replies if isinstance(r, AdapterReply)]
    assert len(adapters[0]["engines"]) == 2, "both have answered with it"
    assert adapters[0]["usage"]["num_requests"] == 6
    (stats,) = [r.stats for r in cluster.replies if isinstance(r, StatsReply)]
    parts = list(stats["engines"].values())
    assert stats["registered_adapters"] == 1
    assert stats["num_resident_adapters"] == 2, "copies in pages, of both"
    assert stats["adapter_usage"]["num_requests"] == 6
    means = [part["adapter_usage"]["ttft_mean_ms"] for part in parts]
    assert min(means) <= stats["adapter_usage"]["ttft_mean_ms"] <= max(means)


def test_counts_are_those_of_all_routers_also_of_one_that_was_started_again(
    tmp_path: Path,
) -> None:
    first, second = (RouterCounts.in_run_dir(str(tmp_path), f"router {i}") for i in range(2))
    book, other = RequestBook(), RequestBook()
    request = book.add(AddRequest(1, array("i", [5, 6]), sampling_spec()), 0.0)
    book.start(request, "engine-0")
    book.recall("engine-0")
    first.write(book, 1)
    second.write(other, 1)
    expected = {"moves": 1, "recomputed_tokens": 0, "lost_engines": 1, "unfinished": 1}
    assert first.total() == second.total() == expected | {"waiting": 1}
    again = RouterCounts.in_run_dir(str(tmp_path), "router 0")
    again.write(RequestBook(), 1)
    assert second.total() == expected | {"lost_engines": 2, "unfinished": 0, "waiting": 0}
