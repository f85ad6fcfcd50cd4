"""Writes dashboard.json for Grafana from the definitions of the series.

python -P examples/grafana/generate_dashboard.py
"""

import json
from pathlib import Path
from typing import Any

from loraplex.entrypoints.metrics.catalogue import SERIES

FILE = Path(__file__).resolve().parent / "dashboard.json"
COMMAND = "python -P examples/grafana/generate_dashboard.py"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
CHOSEN = 'model_name=~"$model_name",engine=~"$engine"'

NAMES = {series.name: series for series in SERIES}
Query = tuple[str, str]
"""An expression and its legend."""


def now(name: str, legend: str, *by: str) -> Query:
    """Shows a gauge, summed over the labels that are not in `by`."""
    return f"{_sum(by)}({NAMES[name].text_name}{{{CHOSEN}}})", legend


def rate(name: str, legend: str, *by: str) -> Query:
    """Shows a counter's growth a second."""
    series = NAMES[name]
    return f"{_sum(by)}(rate({series.text_name}{{{CHOSEN}}}[$__rate_interval]))", legend


def share(part: str, whole: str, legend: str) -> Query:
    return f"{rate(part, '')[0]} / {rate(whole, '')[0]}", legend


def mean(name: str, legend: str) -> Query:
    """Shows the mean of a histogram's values."""
    parts = [
        f"sum(rate({NAMES[name].name}_{end}{{{CHOSEN}}}[$__rate_interval]))"
        for end in ("sum", "count")
    ]
    return " / ".join(parts), legend


def quantiles(name: str, *by: str) -> list[Query]:
    """Shows three quantiles of a histogram."""
    bucket = f"rate({NAMES[name].name}_bucket{{{CHOSEN}}}[$__rate_interval])"
    legend = "".join(f" {{{{{label}}}}}" for label in by)
    return [
        (f"histogram_quantile({q / 100:g}, {_sum((*by, 'le'))}({bucket}))", f"p{q}{legend}")
        for q in (50, 95, 99)
    ]


def _sum(by: tuple[str, ...]) -> str:
    return f"sum by ({', '.join(by)}) " if by else "sum"


SECTIONS: dict[str, list[tuple[str, str, list[Query]]]] = {
    "Requests": [
        ("Running and waiting", "short", [
            now("vllm:num_requests_running", "running"),
            now("vllm:num_requests_waiting", "waiting"),
            now("loraplex_waiting_for_adapter", "of those, for an adapter"),
        ]),
        ("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds")),
        ("Time between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
        ("Ends", "reqps", [rate("vllm:request_success", "{{finished_reason}}", "finished_reason")]),
        ("Time of a request", "s", quantiles("vllm:e2e_request_latency_seconds")),
        ("Time in the queue", "s", quantiles("vllm:request_queue_time_seconds")),
    ],
    "Tokens and steps": [
        ("Tokens", "cps", [
            rate("vllm:generation_tokens", "generated"),
            rate("vllm:prompt_tokens", "prompt"),
        ]),
        ("Tokens of a step", "short", [mean("vllm:iteration_tokens_total", "mean")]),
        ("Steps by kernels", "ops", [
            rate("loraplex_steps", "{{launch}} {{lora}}", "launch", "lora"),
        ]),
        ("GPU idle between steps", "percentunit", [
            share("loraplex_gpu_idle_seconds", "loraplex_step_seconds", "idle / busy"),
        ]),
        ("Refused and preempted", "ops", [
            rate("loraplex_requests_refused", "refused"),
            rate("loraplex_deadline_drops", "too late"),
            rate("vllm:num_preemptions", "preempted"),
        ]),
        ("Engines of the cluster", "short", [now("loraplex_engines", "{{state}}", "state")]),
    ],
    "Page pool": [
        ("Pages by owner", "short", [now("loraplex_pool_pages", "{{owner}}", "owner")]),
        ("Use of the pool by running requests", "percentunit", [
            (f"max by (engine) (vllm:kv_cache_usage_perc{{{CHOSEN}}})", "{{engine}}"),
        ]),
        ("Prefix cache: tokens found", "percentunit", [
            share("vllm:prefix_cache_hits", "vllm:prefix_cache_queries", "hits"),
        ]),
    ],
    "Adapters": [
        ("Adapters by place", "short", [now("loraplex_adapters", "{{place}}", "place")]),
        ("Load time by tier", "s", quantiles("loraplex_adapter_load_seconds", "tier")),
        ("Requests by tier of their adapter", "reqps", [
            rate("loraplex_adapter_requests", "{{tier}}", "tier"),
        ]),
        ("Evictions", "ops", [
            rate("loraplex_adapter_evictions", "adapters"),
            rate("loraplex_prefix_evictions", "prefix blocks"),
        ]),
        ("Failed loads", "ops", [rate("loraplex_adapter_load_failures", "failures")]),
        ("Pinned", "short", [now("loraplex_pinned_pages", "pages")]),
    ],
    "Adapter stores": [
        ("Look-ups by result", "ops", [rate("loraplex_store_lookups", "{{result}}", "result")]),
        ("Time of a download", "s", quantiles("loraplex_store_download_seconds")),
        ("Bytes downloaded", "Bps", [rate("loraplex_store_download_bytes", "bytes")]),
        ("Cache of downloads", "bytes", [now("loraplex_store_cache_bytes", "{{kind}}", "kind")]),
        ("Evictions from the cache", "ops", [rate("loraplex_store_cache_evictions", "adapters")]),
        ("Failed downloads", "ops", [rate("loraplex_store_download_failures", "failures")]),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Returns the dashboard in Grafana's own format."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, section in SECTIONS.items():
        grid = {"h": 1, "w": WIDTH * COLUMNS, "x": 0, "y": y}
        row = {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": grid}
        panels.append({"id": len(panels) + 1, **row})
        y += 1
        for number, (name, unit, queries) in enumerate(section):
            x, line = number % COLUMNS, number // COLUMNS
            grid = {"h": HEIGHT, "w": WIDTH, "x": x * WIDTH, "y": y + line * HEIGHT}
            panels.append({"id": len(panels) + 1, **_panel(name, unit, queries), "gridPos": grid})
        y += HEIGHT * -(-len(section) // COLUMNS)
    return {
        "title": "loraplex",
        "uid": "loraplex",
        "tags": ["llm", "lora"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _variable("model_name"), _variable("engine")]},
        "panels": panels,
    }


def _panel(title: str, unit: str, queries: list[Query]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    stacked = {"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 40}}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, **(stacked if title == "Pages by owner" else {})},
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _variable(label: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values({NAMES['vllm:num_requests_running'].text_name}, {label})",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")
