"""Panels of the plots of the paper benchmarks.

Draw kept rows again: ``python benchmarks/papers/paper_panels.py slora ROWS.jsonl PLOT.svg``.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from loraplex.entrypoints.bench.panels import Row, Series, groups_of, median_and_p99, panel
from loraplex.entrypoints.bench.plot import Panel
from loraplex.entrypoints.bench.results import Results


def slora_panels(rows: Sequence[Row]) -> list[Panel]:
    """Returns panels with a line for each setting, load and number of registered adapters."""
    groups = _runs(rows)
    settings = groups_of(rows, "setting")
    x: Row = {"x": "num_adapters", "x_label": "adapters (0: base model)"}
    paper: list[Series] = [
        (
            "paper (A100 80GB, 10/s)" if len(settings) == 1 else f"paper {name} (A100 80GB, 10/s)",
            list({row["num_adapters"]: row for row in part}.values()),
            "paper_requests_per_s",
        )
        for name, part in settings
    ]
    served: list[Series] = [(name, part, "requests_per_s") for name, part in groups]
    rates: list[Series] = [(name, part, "new_tokens_per_s") for name, part in groups]
    open_loops = [(name, part) for name, part in groups if part[0]["rate"] is not None]
    ttfts: list[Series] = [(f"{name}, mean", part, "ttft_ms_mean") for name, part in open_loops]
    return [
        panel(
            f"{', '.join(n for n, _ in settings)}: requests",
            y_label="requests/s",
            series=served + paper,
            **x,
        ),
        panel("Throughput", y_label="new tokens/s", series=rates, **x),
        panel("Time to first token", y_label="ms", series=ttfts, log_y=True, **x),
    ]


def _runs(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Split the rows into those that one line may join; a label says in what they differ."""
    keys = {"setting": "{}", "load": "{}", "num_registered": "{:,} registered"}
    varied = [key for key in keys if key == "load" or len({row.get(key) for row in rows}) > 1]
    runs: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(keys[key].format(row[key]) for key in varied)
        runs.setdefault(label, []).append(row)
    return list(runs.items())


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


def main(bench: str, rows: Path, plot: Path) -> None:
    panels = {"slora": slora_panels, "punica": punica_panels, "tiers": tiers_panels}[bench]
    results = Results(None, plot, panels)
    for line in rows.read_text(encoding="utf-8").splitlines():
        results.write(json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
