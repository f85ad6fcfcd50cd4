"""The text of a scrape, read by Prometheus' own parser, against what a scheduler has done."""

import time
from typing import Any

import pytest

from loraplex.engine.frontend.request_log import RequestTimes
from loraplex.engine.frontend.statistics.request_histograms import RequestHistograms
from loraplex.engine.stores.store_counts import StoreCounts
from loraplex.entrypoints.metrics.catalogue import SERIES
from loraplex.entrypoints.metrics.exposition import render
from loraplex.entrypoints.metrics.scrape import MAX_LISTED
from loraplex.entrypoints.metrics.series import MAX_VALUES
from loraplex.scheduler.frontend_protocol import AdapterSource

from helpers.scheduling.metric_scrapes import (
    labels_of,
    parse,
    scrape,
    scraped,
    stats_of,
    value,
    values_of,
)
from helpers.scheduling.scheduler_harness import Harness


def run_of_three() -> Harness:
    """Two requests of adapters "a" and "b" and one of the base model, all ended; two slots."""
    harness = Harness(max_adapter_slots=2)
    for name in ("a", "b"):
        harness.register(name)
        harness.add(name, [1, 2, 3], adapter=name, max_tokens=4, stop_token_ids=[])
    harness.add("base", [1, 2, 3, 4, 5], max_tokens=3)
    harness.run()
    return harness


def test_values_are_those_of_the_run() -> None:
    harness = run_of_three()
    num_generated = sum(len(e.token_ids) for e in harness.expected.values())
    stats = stats_of(harness)
    found = scraped(stats)
    assert value(found, "vllm:num_requests_running", model_name="m", engine="0") == 0
    assert value(found, "vllm:prompt_tokens_total") == 11
    assert value(found, "vllm:generation_tokens_total") == num_generated
    assert value(found, "vllm:iteration_tokens_total_count") == stats["num_steps"]
    assert value(found, "vllm:num_gpu_loaded_lora_adapters") == 2
    assert value(found, "loraplex_adapters", place="registered") == 2
    assert sum(values_of(found, "loraplex_pool_pages")) == stats["num_pages"]
    assert value(found, "loraplex_pool_pages", owner="adapter_idle") == stats["pages_adapter"] > 0
    assert value(found, "loraplex_adapter_load_seconds_count", tier="disk") == 2
    assert value(found, "loraplex_adapter_load_seconds_count", tier="host") == 0
    assert sum(values_of(found, "loraplex_steps_total")) == stats["num_steps"]
    assert labels_of(found, "vllm:cache_config_info")[0]["num_gpu_blocks"] == "63"


def test_adapters_are_named_by_their_place() -> None:
    harness = run_of_three()
    harness.register("c")
    harness.register("cold")
    harness.add("c", [1], adapter="c", max_tokens=2)
    harness.scheduler.pin_adapter("b", "key")
    found = scraped(stats_of(harness))
    (info,) = labels_of(found, "vllm:lora_requests_info")
    assert info == {
        "max_lora": "1024",
        "running_lora_adapters": "a,b",
        "waiting_lora_adapters": "c",
    }
    assert abs(value(found, "vllm:lora_requests_info") - time.time()) < 3600
    assert value(found, "vllm:lora_adapter_loaded", adapter_name="b", level="gpu", pinned="true")
    assert not values_of(found, "vllm:lora_adapter_loaded", adapter_name="c")
    harness.run()
    found = scraped(stats_of(harness))
    assert value(found, "vllm:lora_adapter_loaded", adapter_name="a", level="cpu", pinned="false")
    assert value(found, "vllm:lora_adapter_loaded", adapter_name="c", level="gpu", pinned="false")
    assert value(found, "loraplex_adapter_evictions_total") == 1


def test_pages_of_adapters_in_use_are_no_room_for_prompts() -> None:
    stats = stats_of(run_of_three())
    stats |= {"num_pages": 100, "pages_adapter": 60, "pages_adapter_idle": 10, "pages_kv": 25}
    assert value(scraped(stats), "vllm:kv_cache_usage_perc") == 0.5


def test_histograms_and_ends_are_those_of_the_frontends() -> None:
    counts = RequestHistograms()
    for seconds in (0.03, 0.3, 3000.0):
        times = RequestTimes(queued_s=0.01, first_token_s=seconds, last_token_s=seconds + 1)
        counts.observe(times, num_prompt=7, num_output=9, n=1)
    for reason in ("stop", "length", "stop"):
        counts.count_end(reason)
    found = scraped(stats_of(run_of_three()), counts)
    first = "vllm:time_to_first_token_seconds"
    assert value(found, f"{first}_bucket", le="0.02") == 0
    assert value(found, f"{first}_bucket", le="0.04") == 1
    assert value(found, f"{first}_bucket", le="2560.0") == 2
    assert value(found, f"{first}_bucket", le="+Inf") == value(found, f"{first}_count") == 3
    assert value(found, f"{first}_sum") == pytest.approx(3000.33)
    assert value(found, "vllm:request_success_total", finished_reason="stop") == 2
    assert value(found, "vllm:request_success_total", finished_reason="error") == 0


@pytest.fixture(scope="module")
def crowded() -> dict[str, Any]:
    """Statistics with 2,000 adapters in host memory, with long names that need escapes."""
    harness = Harness(check=False, max_adapter_slots=2)
    for number in range(2000):
        name = f'customer-{number:05}-"support"\\chat-{"x" * 60}'
        harness.file(f"/{number}", name)
        harness.scheduler.load_adapter(name, AdapterSource.at(f"/{number}"), number)
    harness.settle()
    return stats_of(harness)


def test_2000_adapters_keep_a_scrape_small(crowded: dict[str, Any]) -> None:
    text = render(scrape(crowded)).decode()
    assert len(text) < 1 << 20
    found = parse(text)
    assert len(values_of(found, "vllm:lora_adapter_loaded")) == MAX_LISTED
    assert value(found, "loraplex_adapters", place="host") == 2000
    names = {labels["adapter_name"] for labels in labels_of(found, "vllm:lora_adapter_loaded")}
    assert all('-"support"\\chat-' in name for name in names)


def test_kernels_of_steps_are_labels_and_other_labels_are_bounded() -> None:
    stats = stats_of(run_of_three())
    stats["steps_by_kernels"] = {"graph+bgmv": 5, "graph": 2, "": 1}
    stats["adapter_usage"]["hits"] = {f"tier-{i}": 1 for i in range(MAX_VALUES + 9)}
    found = scraped(stats)
    assert value(found, "loraplex_steps_total", launch="graph", lora="bgmv") == 5
    assert value(found, "loraplex_steps_total", launch="graph", lora="none") == 2
    assert value(found, "loraplex_steps_total", launch="unknown", lora="none") == 1
    tiers = labels_of(found, "loraplex_adapter_requests_total")
    assert len(tiers) == MAX_VALUES + 1
    assert value(found, "loraplex_adapter_requests_total", tier="other") == 9


def test_a_cluster_shows_each_engine() -> None:
    engines = {"engine-0": stats_of(run_of_three()), "engine-1": stats_of(Harness())}
    rows = [{**row, "engine": "engine-0"} for row in engines["engine-0"]["adapters_by_tier"]]
    states = {"engine-0": {"state": "up"}, "engine-1": {"state": "up"}}
    router = {"engines": states, "waiting": 7, "moves": 3, "recomputed_tokens": 90}
    router["lost_engines"] = 1
    stats = {"engines": engines, "adapters_by_tier": rows, "router": router}
    counts = RequestHistograms()
    counts.count_end("stop")
    found = scraped(stats, counts)
    assert value(found, "vllm:prompt_tokens_total", engine="engine-0") == 11
    assert value(found, "vllm:prompt_tokens_total", engine="engine-1") == 0
    assert value(found, "vllm:request_success_total", engine="router", finished_reason="stop") == 1
    assert value(found, "loraplex_engines", state="up") == 2
    assert value(found, "vllm:num_requests_waiting", engine="router") == 7
    assert value(found, "vllm:num_requests_waiting", engine="engine-1") == 0
    assert value(found, "loraplex_router_moves_total", engine="router") == 3
    assert value(found, "loraplex_router_recomputed_tokens_total", engine="router") == 90
    assert value(found, "loraplex_lost_engines_total", engine="router") == 1
    assert value(found, "vllm:lora_adapter_loaded", engine="engine-0", adapter_name="a") == 1


def test_stores_have_series_where_there_are_stores() -> None:
    stats, stores = stats_of(run_of_three()), StoreCounts()
    assert not [name for name, _ in scraped(stats) if name.startswith("loraplex_store")]
    for result in ("found", "missing", "missing"):
        stores.count_lookup(result)
    stores.count_download(3.0, 700)
    stores.count_failed_download()
    found = scraped(stats, stores=stores.snapshot(), cache_bytes=900)
    assert value(found, "loraplex_store_lookups_total", result="missing") == 2
    assert value(found, "loraplex_store_download_bytes_total") == 700
    assert value(found, "loraplex_store_download_failures_total") == 1
    assert value(found, "loraplex_store_download_seconds_bucket", le="2.5") == 0
    assert value(found, "loraplex_store_download_seconds_bucket", le="5.0") == 1
    assert value(found, "loraplex_store_cache_bytes", kind="used") == 900
    assert value(found, "loraplex_store_cache_bytes", kind="limit") == 32 << 30


def test_every_series_has_a_name_and_labels_that_prometheus_takes() -> None:
    stores = {"stores": StoreCounts().snapshot(), "cache_bytes": 0}
    found = scraped(stats_of(run_of_three()), **stores)
    assert len({series.name for series in SERIES}) == len(SERIES)
    for series in SERIES:
        assert series.name.startswith(("vllm:", "loraplex_"))
        assert series.help.endswith(".")
        names = {series.text_name, f"{series.name}_bucket"}
        for name, labels in found:
            if name in names:
                assert {key for key, _ in labels} - {"le"} == set(series.labels)
