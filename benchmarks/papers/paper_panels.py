"""Panels of the plots of the paper benchmarks."""

from collections.abc import Sequence

from loraplex.entrypoints.bench.panels import Row, Series, groups_of, median_and_p99, panel
from loraplex.entrypoints.bench.plot import Panel


def slora_panels(rows: Sequence[Row]) -> list[Panel]:
    groups = groups_of(rows, "load")
    x: Row = {"x": "num_adapters", "x_label": "adapters (0: base model)"}
    paper: list[Series] = [("paper (A100 80GB, 10/s)", groups[0][1], "paper_requests_per_s")]
    served: list[Series] = [(name, part, "requests_per_s") for name, part in groups]
    rates: list[Series] = [(name, part, "new_tokens_per_s") for name, part in groups]
    open_loops = [(name, part) for name, part in groups if part[0]["rate"] is not None]
    ttfts: list[Series] = [(f"{name}, mean", part, "ttft_ms_mean") for name, part in open_loops]
    return [
        panel(f"{rows[0]['setting']}: requests", y_label="requests/s", series=served + paper, **x),
        panel("Throughput", y_label="new tokens/s", series=rates, **x),
        panel("Time to first token", y_label="ms", series=ttfts, log_y=True, **x),
    ]


def punica_panels(rows: Sequence[Row]) -> list[Panel]:
    groups = groups_of(rows, "batch", "batch {}")
    x: Row = {"x": "popularity", "x_label": ""}
    paper: list[Series] = [("paper (A100 80GB, batch 32)", groups[0][1], "paper_tokens_per_s")]
    rates: list[Series] = [(name, part, "new_tokens_per_s") for name, part in groups]
    shares: list[Series] = [(name, part, "of_identical") for name, part in groups]
    return [
        panel("Throughput", y_label="new tokens/s", series=rates + paper, **x),
        panel("Share of Identical", y_label="", series=shares, **x),
    ]


def tiers_panels(rows: Sequence[Row]) -> list[Panel]:
    firsts = [row for row in rows if row["part"] == "ttft"]
    gaps = [row for row in rows if row["part"] == "inter_token"]
    x: Row = {"x": "case", "x_label": ""}
    return [
        panel("First token, by the adapter's tier", y_label="ms",
               series=median_and_p99(firsts, "ttft_ms"), **x),
        panel("Time between the others' tokens", y_label="ms",
               series=median_and_p99(gaps, "inter_token_ms"), **x),
    ]  # fmt: skip
