"""Draws line plots with matplotlib, which is imported only when a plot is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
_PANEL_INCHES = (4.8, 3.8)
_MAX_MARKERS = 16  # a line of more points has no markers
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "loraplex",  # the same plot is the same file
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; `points` are (x, y) in order of x."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    y starts at 0, or is logarithmic with `log_y`. `x_ticks` are (x, text) of an axis of names.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line] = field(default_factory=list)
    log_y: bool = False
    x_ticks: Sequence[tuple[float, str]] = ()


def check_plot(path: Path) -> None:
    """Check that draw() can write this file.

    Raises:
        ConfigError: the suffix is unknown, the directory does not exist, or matplotlib is absent.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a plot's name ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {path.parent}")
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'loraplex[bench]'")


def draw(panels: Sequence[Panel], path: Path, *, caption: str) -> None:
    """Draw panels side by side over a caption into an SVG or PNG file, chosen by the suffix.

    Raises:
        ConfigError: as check_plot().
    """
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    width, height = _PANEL_INCHES
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width * len(panels), height), layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw_panel(axes, panel)
        figure.supxlabel(caption, fontsize=9)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for line in panel.lines:
        marker = "o" if len(line.points) <= _MAX_MARKERS else None
        axes.plot(
            [x for x, _ in line.points],
            [y for _, y in line.points],
            label=line.label,
            linestyle="--" if line.dashed else "-",
            marker=marker,
            markersize=4,
        )
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(axis="y", color="0.87")
    if panel.x_ticks:
        axes.set_xticks([x for x, _ in panel.x_ticks], [text for _, text in panel.x_ticks])
    if panel.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    if panel.lines:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False, fontsize=8
        )
