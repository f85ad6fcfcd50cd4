"""Plots the lines that cluster_sim.py wrote.

python benchmarks/simulation/cluster_panels.py cluster_sim.jsonl cluster_sim.svg
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraplex.entrypoints.bench.plot import Line, Panel, draw

from cluster_sim import COMPARED, NOTE

Row = dict[str, Any]


def first_uses(rows: Sequence[Row]) -> Line:
    """Returns the loads that no placement avoids, by rate."""
    points = [
        (row["trace"]["rate"], 200 * row["first_uses_second_half"] / row["requests"])
        for row in rows
        if row["part"] == "slora" and row["placement"] == COMPARED[0]
    ]
    return Line("first uses", sorted(points), dashed=True)


def by_rate(rows: Sequence[Row], value: Callable[[Row], float]) -> list[Line]:
    """Returns one line for each placement: a value of S-LoRA's trace by rate."""
    lines = []
    for placement in COMPARED:
        points = sorted(
            (row["trace"]["rate"], value(row))
            for row in rows
            if row["part"] == "slora" and row["placement"] == placement
        )
        lines.append(Line(placement, points))
    return lines


def engines_in_use(rows: Sequence[Row]) -> list[Line]:
    """Returns the engines in use over the day, as steps."""
    lines = []
    for row in rows:
        if row["part"] != "day" or row["placement"] == "affinity":
            continue
        points: list[tuple[float, float]] = []
        for at, number in row["engines_in_use"]:
            points += [(at, points[-1][1]), (at, number)] if points else [(at, number)]
        points.append((row["end_s"], points[-1][1]))
        always = row["scale"] is None
        lines.append(Line("always on" if always else row["placement"], points, dashed=always))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the lines of cluster_sim.py.")
    parser.add_argument("results", type=Path)
    parser.add_argument("plot", type=Path, help=".svg or .png")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    loads = by_rate(rows, lambda row: 200 * row["adapter_loads_second_half"] / row["requests"])
    panels = [
        Panel("Adapter loads, second half of a run", "requests/s", "% of requests",
              [*loads, first_uses(rows)]),
        Panel("First token, p99", "requests/s", "ms",
              by_rate(rows, lambda row: 1e3 * row["ttft_p99_s"])),
        Panel("Engines in use over a day's curve", "s", "engines", engines_in_use(rows)),
    ]  # fmt: skip
    draw(panels, options.plot, caption=NOTE)


if __name__ == "__main__":
    main()
