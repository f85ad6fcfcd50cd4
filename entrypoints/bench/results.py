"""Where a benchmark's numbers go: a table on the screen, JSON lines, and a plot beside them."""

import json
from pathlib import Path
from typing import Any

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.plots import plot

Row = dict[str, Any]


class Results:
    """Appends JSON lines to `out`, and draws this run's rows to the .svg of the same name after
    each; does nothing where `out` is None.

    Raises:
        ConfigError: `out` is in no directory, or is itself the plot's name.
    """

    def __init__(self, out: Path | None) -> None:
        if out is not None and not out.parent.is_dir():
            raise ConfigError(f"--out: there is no directory {out.parent}")
        if out is not None and out.suffix == ".svg":
            raise ConfigError("--out takes JSON lines; the plot goes beside it, to a .svg")
        self._out = out
        self._rows: list[Row] = []

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if self._out is None:
            return
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        drawing = plot(self._rows)
        if drawing:
            self._out.with_suffix(".svg").write_text(drawing, encoding="utf-8")


class Table:
    """Rows printed as they come, under one head."""

    def __init__(self, **widths: int) -> None:
        """Column names and widths; a negative width is left-aligned."""
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
