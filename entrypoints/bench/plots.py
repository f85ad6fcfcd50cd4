"""A benchmark's rows as an SVG plot."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loraplex.entrypoints.bench.svg import Line, Panel, draw

Row = dict[str, Any]
Series = tuple[str, Sequence[Row], str]  # label, rows, key of y


def plot(rows: Sequence[Row]) -> str:
    """The plot of one benchmark's rows; empty where they hold nothing to draw."""
    panels = [panel for panel in _PANELS[rows[0]["bench"]](rows) if any(_points(panel))]
    return draw(panels, caption=_caption(rows[0])) if panels else ""


def _points(panel: Panel) -> Iterable[object]:
    return (point for line in panel.lines for point in line.points)


def _caption(row: Row) -> str:
    parts = (row.get(key) for key in ("model", "device", "lora_backend", "attention_backend"))
    return ", ".join(str(part) for part in parts if part)


def _panel(
    title: str, x: str, y_label: str, series: Sequence[Series], *, x_label: str, log_y: bool = False
) -> Panel:
    """The values of `x` stand side by side at equal distance, in their first order."""
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


def _groups(rows: Sequence[Row], key: str, name: str = "{}") -> list[tuple[str, list[Row]]]:
    """(label, rows) by the value of `key`."""
    values = dict.fromkeys(row.get(key) for row in rows)
    return [(name.format(v), [row for row in rows if row.get(key) == v]) for v in values]


def _throughput(rows: Sequence[Row]) -> list[Panel]:
    gaps = [("median", rows, "inter_token_ms_p50"), ("p99", rows, "inter_token_ms_p99")]
    x: Row = {"x": "num_adapters", "x_label": "adapters (0: base model)"}
    return [
        _panel(
            "Throughput",
            y_label="new tokens/s",
            series=[("loraplex", rows, "new_tokens_per_s")],
            **x,
        ),
        _panel("Time between tokens", y_label="ms", series=gaps, **x),
    ]


def _latency(rows: Sequence[Row]) -> list[Panel]:
    groups = _groups(rows, "popularity")
    x: Row = {"x": "batch", "x_label": "requests at once"}
    steps = [(name, part, "step_ms") for name, part in groups]
    rates = [(name, part, "new_tokens_per_s") for name, part in groups]
    return [
        _panel("Step time, all decoding", y_label="ms", series=steps, **x),
        _panel("Throughput", y_label="new tokens/s", series=rates, **x),
    ]


def _serve(rows: Sequence[Row]) -> list[Panel]:
    x: Row = {"x": "rate", "x_label": "requests/s offered"}
    return [
        _panel(
            "Time to first token", y_label="ms", series=_spread(rows, "ttft_ms"), log_y=True, **x
        ),
        _panel("Time between tokens", y_label="ms", series=_spread(rows, "inter_token_ms"), **x),
        _panel(
            "First token in time", y_label="share", series=[("loraplex", rows, "attainment")], **x
        ),
    ]


def _spread(rows: Sequence[Row], name: str) -> list[Series]:
    return [("median", rows, f"{name}_p50"), ("p99", rows, f"{name}_p99")]


def _slora(rows: Sequence[Row]) -> list[Panel]:
    groups = _groups(rows, "load")
    x: Row = {"x": "num_adapters", "x_label": "adapters (0: base model)"}
    paper: list[Series] = [("paper (A100 80GB, 10/s)", groups[0][1], "paper_requests_per_s")]
    served: list[Series] = [(name, part, "requests_per_s") for name, part in groups]
    rates: list[Series] = [(name, part, "new_tokens_per_s") for name, part in groups]
    open_loops = [(name, part) for name, part in groups if part[0]["rate"] is not None]
    ttfts: list[Series] = [(f"{name}, mean", part, "ttft_ms_mean") for name, part in open_loops]
    return [
        _panel(f"{rows[0]['setting']}: requests", y_label="requests/s", series=served + paper, **x),
        _panel("Throughput", y_label="new tokens/s", series=rates, **x),
        _panel("Time to first token", y_label="ms", series=ttfts, log_y=True, **x),
    ]


def _punica(rows: Sequence[Row]) -> list[Panel]:
    groups = _groups(rows, "batch", "batch {}")
    x: Row = {"x": "popularity", "x_label": ""}
    paper: list[Series] = [("paper (A100 80GB, batch 32)", groups[0][1], "paper_tokens_per_s")]
    rates: list[Series] = [(name, part, "new_tokens_per_s") for name, part in groups]
    shares: list[Series] = [(name, part, "of_identical") for name, part in groups]
    return [
        _panel("Throughput", y_label="new tokens/s", series=rates + paper, **x),
        _panel("Share of Identical", y_label="", series=shares, **x),
    ]


def _tiers(rows: Sequence[Row]) -> list[Panel]:
    firsts = [row for row in rows if row["part"] == "ttft"]
    gaps = [row for row in rows if row["part"] == "inter_token"]
    x: Row = {"x": "case", "x_label": ""}
    return [
        _panel("First token, by the adapter's tier", y_label="ms",
               series=_spread(firsts, "ttft_ms"), **x),
        _panel("Time between the others' tokens", y_label="ms",
               series=_spread(gaps, "inter_token_ms"), **x),
    ]  # fmt: skip


_PANELS: dict[str, Callable[[Sequence[Row]], list[Panel]]] = {
    "throughput": _throughput,
    "latency": _latency,
    "serve": _serve,
    "slora": _slora,
    "punica": _punica,
    "tiers": _tiers,
}
