"""Destinations of a benchmark's rows: a table on the screen, JSON lines and a plot."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.plot import SUFFIXES, Panel, check_plot, draw

Row = dict[str, Any]
MakePanels = Callable[[Sequence[Row]], list[Panel]]
_CAPTION = ("model", "device", "lora_backend", "attention_backend")


class Results:
    """Appends rows to a file of JSON lines and plots the rows of this run.

    The plot is drawn again after each row, so that an interrupted run leaves one.
    """

    def __init__(self, out: Path | None, plot: Path | None, make_panels: MakePanels) -> None:
        """Check the paths before anything is measured. A path of None writes nothing.

        Raises:
            ConfigError: a path cannot be written, or `plot` is given without matplotlib.
        """
        if out is not None and out.suffix in SUFFIXES:
            raise ConfigError("--out takes JSON lines: give the name of the plot with --plot")
        if out is not None and not out.parent.is_dir():
            raise ConfigError(f"--out: there is no directory {out.parent}")
        if plot is not None:
            check_plot(plot)
        self._out = out
        self._plot = plot
        self._make_panels = make_panels
        self._rows: list[Row] = []

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self._plot is not None:
            panels = [panel for panel in self._make_panels(self._rows) if panel.lines]
            if panels:
                caption = ", ".join(str(row[key]) for key in _CAPTION if row.get(key))
                draw(panels, self._plot, caption=caption)


class Table:
    """Prints a header, then each row as it is measured."""

    def __init__(self, **widths: int) -> None:
        """Print the header. `widths` are characters by column; a negative width aligns left."""
        self._widths = widths
        print("  ".join(f"{k:{_align(w)}}" for k, w in widths.items()), flush=True)

    def add(self, row: Row) -> None:
        cells = []
        for name, width in self._widths.items():
            value = row.get(name)
            text = f"{value:,.2f}" if isinstance(value, float) else str(value)
            cells.append(f"{'-' if value is None else text:{_align(width)}}")
        print("  ".join(cells), flush=True)


def _align(width: int) -> str:
    return f">{width}" if width > 0 else f"<{-width}"
