"""Draws the rows of lora_kernels.py."""

from pathlib import Path
from typing import Any

from loraplex.entrypoints.bench.plot import Line, Panel, draw


def draw_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the decode steps of the largest sweep: each popularity, backend and the floor."""
    sweep = [r for r in rows if r["model"] == "llama-3-8b" and r["num_tokens"] <= 256]
    sweep = [r for r in sweep if r["ranks"] == [16] and not r["num_resident"]]
    panels = []
    for popularity in ("distinct", "uniform", "skewed", "identical"):
        chosen = [r for r in sweep if r["popularity"] == popularity]
        if not chosen:
            continue
        sizes = sorted({r["num_tokens"] for r in chosen})
        at = {size: float(index) for index, size in enumerate(sizes)}
        backends = dict.fromkeys(r["backend"] for r in chosen)
        lines = [
            Line(
                name, sorted((at[r["num_tokens"]], r["us"]) for r in chosen if r["backend"] == name)
            )
            for name in backends
        ]
        floor = sorted({(at[r["num_tokens"]], r["floor_us"]) for r in chosen})
        lines.append(Line("floor", floor, dashed=True))
        ticks = [(index, str(size)) for size, index in at.items()]
        title = f"{popularity} adapters"
        panels.append(Panel(title, "rows", "us a layer", lines, log_y=True, x_ticks=ticks))
    draw(panels, path, caption=f"Llama-3-8B, rank 16, all projections, {rows[0]['gpu']}")
