"""The series that vLLM has too, under its names, labels and bounds."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from loraplex.entrypoints.metrics.scrape import Scrape
from loraplex.entrypoints.metrics.series import (
    Reader,
    Sample,
    Series,
    by_label,
    counter,
    each_engine,
    gauge,
    histogram,
    of_router,
    stat,
)

_Stats = Mapping[str, Any]


def _kv_usage(stats: _Stats) -> float:
    in_use = stats["pages_adapter"] - stats["pages_adapter_idle"]
    return float(stats["pages_kv"] / max(1, stats["num_pages"] - in_use))


def _waiting_by_reason(stats: _Stats) -> dict[str, int]:
    deferred = stats["waiting_for_adapter"]
    return {"capacity": stats["waiting"] - deferred, "deferred": deferred}


def _prompt_tokens(stats: _Stats) -> int:
    return int(sum(stats[key]["num_prompt_tokens"] for key in ("base_usage", "adapter_usage")))


def _of_frontends(name: str) -> Reader:
    return lambda scrape: [({"engine": scrape.frontends}, scrape.histograms[name])]


def _ends(scrape: Scrape) -> Iterator[Sample]:
    for reason, count in scrape.ends.items():
        yield {"engine": scrape.frontends, "finished_reason": reason}, count


def _cache_config(scrape: Scrape) -> Iterator[Sample]:
    memory = scrape.config.memory
    for engine, stats in scrape.engines.items():
        yield (
            {
                "engine": engine,
                "block_size": str(memory.block_tokens),
                "cache_dtype": memory.kv_cache_dtype,
                "enable_prefix_caching": str(memory.enable_prefix_caching),
                "gpu_memory_utilization": str(memory.gpu_memory_utilization),
                "num_gpu_blocks": str(stats["num_pages"]),
            },
            1,
        )


def _names(scrape: Scrape, *tiers: str) -> str:
    return ",".join(sorted({row["name"] for row in scrape.adapters if row["tier"] in tiers}))


def _lora_info(scrape: Scrape) -> Iterator[Sample]:
    yield (
        {
            "max_lora": str(scrape.config.memory.max_adapter_slots),
            "running_lora_adapters": _names(scrape, "pages"),
            "waiting_lora_adapters": _names(scrape, "loading", "queued"),
        },
        time.time(),
    )


def _loaded(scrape: Scrape) -> Iterator[Sample]:
    levels = {"pages": "gpu", "host": "cpu"}
    for row in scrape.adapters:
        if row["tier"] in levels:
            yield (
                {
                    "engine": row["engine"],
                    "adapter_name": row["name"],
                    "level": levels[row["tier"]],
                    "pinned": str(row["pinned"]).lower(),
                },
                1,
            )


def _of_requests(name: str, text: str) -> Series:
    return histogram(f"vllm:{name}", text, _of_frontends(name))


VLLM_SERIES = (
    gauge("vllm:num_requests_running", "Requests in the batch.", stat("running")),
    gauge(
        "vllm:num_requests_waiting",
        "Requests that wait to start. In a cluster most wait in the routers, while no engine has "
        "room.",
        lambda scrape: [*stat("waiting")(scrape), *of_router("waiting")(scrape)],
    ),
    gauge(
        "vllm:num_requests_waiting_by_reason",
        "Waiting requests by reason: capacity (for a place in the batch), deferred (for their "
        "adapter).",
        by_label("reason", _waiting_by_reason),
        "reason",
    ),
    gauge(
        "vllm:kv_cache_usage_perc",
        "Pages of running requests, as a share (0 to 1) of the pages that no adapter in use holds.",
        each_engine(_kv_usage),
    ),
    Series(
        "vllm:cache_config_info",
        "gauge",
        "Sizes of the page pool, as labels; its value is 1.",
        _cache_config,
        (
            "engine", "block_size", "cache_dtype", "enable_prefix_caching",
            "gpu_memory_utilization", "num_gpu_blocks",
        ),
    ),
    counter(
        "vllm:prefix_cache_queries",
        "Prompt tokens that were looked up in the prefix cache.",
        stat("prefix_query_tokens"),
    ),
    counter(
        "vllm:prefix_cache_hits",
        "Prompt tokens that the prefix cache had.",
        stat("prefix_hit_tokens"),
    ),
    counter(
        "vllm:num_preemptions",
        "Times that a running request was put back into the queue for lack of pages.",
        stat("num_preemptions"),
    ),
    counter(
        "vllm:prompt_tokens",
        "Prompt tokens of requests that have got a first token.",
        each_engine(_prompt_tokens),
    ),
    counter(
        "vllm:spec_decode_num_draft_tokens",
        "Draft tokens that were verified.",
        stat("num_drafted_tokens"),
    ),
    counter(
        "vllm:spec_decode_num_accepted_tokens",
        "Draft tokens that were equal to the sampled ones.",
        stat("num_accepted_tokens"),
    ),
    counter("vllm:generation_tokens", "Generated tokens.", stat("num_generated_tokens")),
    counter(
        "vllm:request_success",
        "Sequences that have ended, by reason: stop, length, abort, error.",
        _ends,
        "finished_reason",
    ),
    histogram(
        "vllm:iteration_tokens_total",
        "Tokens that a step feeds to the model.",
        stat("step_tokens"),
    ),
    _of_requests("time_to_first_token_seconds", "Time from arrival to the first token."),
    _of_requests("inter_token_latency_seconds", "Time between two tokens of a sequence."),
    _of_requests(
        "request_time_per_output_token_seconds", "Mean time between the tokens of a request."
    ),
    _of_requests("e2e_request_latency_seconds", "Time from arrival to the last token."),
    _of_requests("request_queue_time_seconds", "Time that a request waits to start."),
    _of_requests("request_prefill_time_seconds", "Time from the start to the first token."),
    _of_requests("request_decode_time_seconds", "Time from the first token to the last one."),
    _of_requests("request_inference_time_seconds", "Time from the start to the last token."),
    _of_requests("request_prompt_tokens", "Prompt tokens of a finished request."),
    _of_requests("request_generation_tokens", "Generated tokens of a finished request."),
    _of_requests("request_params_n", "Number of answers that a request asks for."),
    Series(
        "vllm:lora_requests_info",
        "gauge",
        "Adapters by place, as labels with names joined by commas: in pages (running), loading or "
        "queued for a request (waiting). Its value is the Unix time.",
        _lora_info,
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    ),
    gauge(
        "vllm:lora_adapter_loaded",
        "1 for each adapter in pages (level gpu), or in host memory alone (level cpu).",
        _loaded,
        "adapter_name",
        "level",
        "pinned",
    ),
    gauge(
        "vllm:num_gpu_loaded_lora_adapters",
        "Adapters in pages. Equal ones under several names count once.",
        stat("num_resident_adapters"),
    ),
    gauge(
        "vllm:num_cpu_loaded_lora_adapters",
        "Adapters in host memory, in pages or not. Equal ones count once.",
        stat("host_adapters"),
    ),
)  # fmt: skip
