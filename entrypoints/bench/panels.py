"""Panels of the plots, by benchmark."""

from collections.abc import Sequence
from typing import Any

from loraplex.entrypoints.bench.plot import Line, Panel

Row = dict[str, Any]
Series = tuple[str, Sequence[Row], str]
"""Label of a line, its rows, and the key of y in them."""


def panel(
    title: str, x: str, y_label: str, series: Sequence[Series], *, x_label: str, log_y: bool = False
) -> Panel:
    """Make a panel with a line for each series.

    The values of `x` are placed at equal distances: numbers in order, names as they first appear.
    A series without values is left out.
    """
    values = list(dict.fromkeys(row[x] for _, rows, _ in series for row in rows))
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    position = {value: float(index) for index, value in enumerate(values)}
    lines = []
    for label, rows, key in series:
        found = [(position[row[x]], float(row[key])) for row in rows if row.get(key) is not None]
        if found:
            lines.append(Line(label, sorted(found), dashed=label.startswith("paper")))
    ticks = [(index, f"{value:g}" if isinstance(value, float) else str(value))
             for value, index in position.items()]  # fmt: skip
    return Panel(title, x_label, y_label, lines, log_y, ticks)


def groups_of(rows: Sequence[Row], key: str, name: str = "{}") -> list[tuple[str, list[Row]]]:
    """Split the rows by their value of `key` into (label, rows)."""
    values = dict.fromkeys(row.get(key) for row in rows)
    return [(name.format(v), [row for row in rows if row.get(key) == v]) for v in values]


def throughput_panels(rows: Sequence[Row]) -> list[Panel]:
    gaps = [("median", rows, "inter_token_ms_p50"), ("p99", rows, "inter_token_ms_p99")]
    x: Row = {"x": "num_adapters", "x_label": "adapters (0: base model)"}
    return [
        panel(
            "Throughput",
            y_label="new tokens/s",
            series=[("loraplex", rows, "new_tokens_per_s")],
            **x,
        ),
        panel("Time between tokens", y_label="ms", series=gaps, **x),
    ]


def latency_panels(rows: Sequence[Row]) -> list[Panel]:
    groups = groups_of(rows, "popularity")
    x: Row = {"x": "batch", "x_label": "requests at once"}
    steps = [(name, part, "step_ms") for name, part in groups]
    rates = [(name, part, "new_tokens_per_s") for name, part in groups]
    return [
        panel("Step time, all decoding", y_label="ms", series=steps, **x),
        panel("Throughput", y_label="new tokens/s", series=rates, **x),
    ]


def serve_panels(rows: Sequence[Row]) -> list[Panel]:
    x: Row = {"x": "rate", "x_label": "requests/s offered"}
    ttft, gaps = median_and_p99(rows, "ttft_ms"), median_and_p99(rows, "inter_token_ms")
    in_time: list[Series] = [("loraplex", rows, "attainment")]
    return [
        panel("Time to first token", y_label="ms", series=ttft, log_y=True, **x),
        panel("Time between tokens", y_label="ms", series=gaps, **x),
        panel("First token in time", y_label="share", series=in_time, **x),
    ]


def cluster_panels(rows: Sequence[Row]) -> list[Panel]:
    x: Row = {"x": "case", "x_label": ""}
    rate: list[Series] = [("loraplex", rows, "new_tokens_per_s")]
    ttft = median_and_p99(rows, "alone_ttft_ms")
    return [
        panel("Throughput", y_label="new tokens/s", series=rate, **x),
        panel("First token of a request that is alone", y_label="ms", series=ttft, **x),
    ]


def median_and_p99(rows: Sequence[Row], name: str) -> list[Series]:
    """Series of the median and of the 99th percentile of a latency."""
    return [("median", rows, f"{name}_p50"), ("p99", rows, f"{name}_p99")]
