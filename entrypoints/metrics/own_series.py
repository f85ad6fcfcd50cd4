"""The series of loraplex alone: its page pool, its adapters' loads, its steps."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loraplex.entrypoints.metrics.scrape import ROUTER, Scrape
from loraplex.entrypoints.metrics.series import (
    Reader,
    Sample,
    by_label,
    counter,
    gauge,
    histogram,
    of_router,
    stat,
)
from loraplex.scheduler.worker_protocol import WorkerReady

_Stats = Mapping[str, Any]


def _pages(stats: _Stats) -> dict[str, int]:
    return {
        "free": stats["pages_free"],
        "kv": stats["pages_kv"],
        "prefix": stats["pages_prefix"],
        "adapter_in_use": stats["pages_adapter"] - stats["pages_adapter_idle"],
        "adapter_idle": stats["pages_adapter_idle"],
    }


def _adapters(stats: _Stats) -> dict[str, int]:
    return {
        "registered": stats["registered_adapters"],
        "host": stats["host_adapters"],
        "pages": stats["num_resident_adapters"],
        "pinned": stats["pinned_adapters"],
    }


def _steps(scrape: Scrape) -> Iterator[Sample]:
    for engine, stats in scrape.engines.items():
        counts: Counter[tuple[str, str]] = Counter()
        for kernels, count in stats["steps_by_kernels"].items():
            launch, _, lora = kernels.partition("+")
            counts[launch or "unknown", lora or "none"] += count
        for (launch, lora), count in sorted(counts.items()):
            yield {"engine": engine, "launch": launch, "lora": lora}, count


def _worker_info(scrape: Scrape) -> Iterator[Sample]:
    for worker in scrape.workers:
        yield (
            {
                "engine": "0",
                "rank": str(worker.rank),
                "device": worker.device,
                "lora_backend": worker.lora_backend,
                "attention_backend": worker.attention_backend,
                "linear_backend": worker.linear_backend,
            },
            1,
        )


def _of_workers(value: Callable[[WorkerReady], int]) -> Reader:
    return lambda scrape: (
        ({"engine": "0", "rank": str(worker.rank)}, value(worker)) for worker in scrape.workers
    )


def _engines(scrape: Scrape) -> Iterator[Sample]:
    for state, count in (scrape.engine_states or {}).items():
        yield {"engine": ROUTER, "state": state}, count


OWN_SERIES = (
    gauge(
        "loraplex_pool_pages",
        "Pages of the pool by owner: free, kv (running requests), prefix (cached prompts that may "
        "be evicted), adapter_in_use (loading, running or pinned), adapter_idle (may be evicted).",
        by_label("owner", _pages),
        "owner",
    ),
    gauge("loraplex_pinned_pages", "Pages that pinned adapters need.", stat("pages_pinned")),
    gauge(
        "loraplex_adapters",
        "Adapters: registered (names), host (in host memory), pages (in pages), pinned.",
        by_label("place", _adapters),
        "place",
    ),
    histogram(
        "loraplex_adapter_load_seconds",
        "Time of a load into pages, by the tier that the adapter came from: host or disk.",
        by_label("tier", lambda stats: stats["adapter_load_seconds"]),
        "tier",
    ),
    counter(
        "loraplex_adapter_load_failures",
        "Loads into pages that failed.",
        stat("num_adapter_load_failures"),
    ),
    counter(
        "loraplex_adapter_prefetches",
        "Loads that began before their request could start.",
        stat("num_adapter_prefetches"),
    ),
    counter(
        "loraplex_adapter_requests",
        "Requests with a first token, by the slowest place of their adapters when they came: "
        "pages, host, disk.",
        by_label("tier", lambda stats: stats["adapter_usage"]["hits"]),
        "tier",
    ),
    counter(
        "loraplex_adapter_evictions",
        "Adapters evicted from pages to make room.",
        stat("num_adapter_evictions"),
    ),
    counter(
        "loraplex_prefix_evictions",
        "Prefix blocks evicted to make room.",
        stat("num_prefix_evictions"),
    ),
    counter(
        "loraplex_requests_refused",
        "Requests that the scheduler refused: the queue was full, or they could not be served.",
        stat("num_refused"),
    ),
    counter(
        "loraplex_deadline_drops",
        "Requests that failed because their first token would have been late.",
        stat("num_deadline_drops"),
    ),
    counter(
        "loraplex_steps",
        "Steps by launch (graph, pieces, eager) and by the LoRA kernels that ran (none: base rows "
        "alone).",
        _steps,
        "launch",
        "lora",
    ),
    gauge("loraplex_steps_in_flight", "Steps planned and not answered.", stat("steps_in_flight")),
    counter("loraplex_step_seconds", "Time of all steps.", stat("step_us", scale=1e-6)),
    counter(
        "loraplex_gpu_idle_seconds",
        "Time that the GPU had nothing to do before a step though requests were running.",
        stat("idle_us", scale=1e-6),
    ),
    counter(
        "loraplex_scheduled_tokens",
        "Tokens fed to the model, recomputed ones included.",
        stat("num_scheduled_tokens"),
    ),
    counter(
        "loraplex_dropped_tokens",
        "Tokens sampled after their request had ended.",
        stat("num_dropped_tokens"),
    ),
    gauge(
        "loraplex_waiting_for_adapter",
        "Requests that wait for their adapter.",
        stat("waiting_for_adapter"),
    ),
    gauge(
        "loraplex_worker_info",
        "Device and backends of each worker, as labels; its value is 1. Not in a cluster.",
        _worker_info,
        "rank",
        "device",
        "lora_backend",
        "attention_backend",
        "linear_backend",
    ),
    gauge(
        "loraplex_weight_bytes",
        "Bytes of the base model's weights on each worker. Not in a cluster.",
        _of_workers(lambda worker: worker.weight_bytes),
        "rank",
    ),
    gauge(
        "loraplex_pool_bytes",
        "Bytes of the page pool on each worker. Not in a cluster.",
        _of_workers(lambda worker: worker.num_pages * worker.page_bytes * worker.num_layers),
        "rank",
    ),
    counter(
        "loraplex_router_moves",
        "Requests that a cluster's routers sent again to another engine.",
        of_router("moves"),
    ),
    counter(
        "loraplex_router_recomputed_tokens",
        "Tokens of moved requests that were computed again.",
        of_router("recomputed_tokens"),
    ),
    counter(
        "loraplex_lost_engines",
        "Engines of a cluster that died, hung or did not answer.",
        of_router("lost_engines"),
    ),
    gauge(
        "loraplex_engines",
        "Engines of a cluster by state: up, draining, suspect, connecting.",
        _engines,
        "state",
    ),
)
