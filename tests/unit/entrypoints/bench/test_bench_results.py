"""Destinations of rows: JSON lines, plots and the table."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.panels import latency_panels, serve_panels, throughput_panels
from loraplex.entrypoints.bench.plot import Line, Panel, draw
from loraplex.entrypoints.bench.results import Results, Table

Row = dict[str, Any]
THROUGHPUT: list[Row] = [
    {"model": "tiny", "device": "a <GPU>", "num_adapters": n, "new_tokens_per_s": 90.0 - n,
     "inter_token_ms_p50": 1.0, "inter_token_ms_p99": 3.0} for n in (32, 0)
]  # fmt: skip
LATENCY: list[Row] = [
    {"batch": b, "popularity": p, "step_ms": 2.0, "new_tokens_per_s": 9.0}
    for p in ("base", "distinct") for b in (1, 64)
]  # fmt: skip
SERVE: list[Row] = [
    {"rate": r, "attainment": 0.5, "ttft_ms_p50": 5.0, "ttft_ms_p99": 70.0,
     "inter_token_ms_p50": 1.0} for r in (1.0, 2.5)
]  # fmt: skip


def text_of(svg: Path) -> str:
    return " ".join(ElementTree.parse(svg).getroot().itertext())


def test_numbers_are_in_order_at_equal_distance() -> None:
    rate, gaps = throughput_panels(THROUGHPUT)
    assert rate.x_ticks == [(0.0, "0"), (1.0, "32")]
    assert rate.lines == [Line("loraplex", [(0.0, 90.0), (1.0, 58.0)])]
    assert [line.label for line in gaps.lines] == ["median", "p99"]


def test_each_popularity_has_a_line() -> None:
    for panel in latency_panels(LATENCY):
        assert [line.label for line in panel.lines] == ["base", "distinct"]
        assert [text for _, text in panel.x_ticks] == ["1", "64"]


def test_values_that_are_missing_leave_no_line() -> None:
    ttft, gaps, _ = serve_panels(SERVE)
    assert ttft.log_y and len(ttft.lines) == 2
    assert [text for _, text in ttft.x_ticks] == ["1", "2.5"]
    assert [line.label for line in gaps.lines] == ["median"]


def test_an_svg_holds_its_texts_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(throughput_panels(THROUGHPUT), tmp_path / name, caption="a <GPU>, $5")
    text = text_of(tmp_path / "a.svg")
    for part in ("a <GPU>, $5", "Throughput", "new tokens/s", "adapters (0: base model)", "p99"):
        assert part in text
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_is_chosen_by_its_suffix(tmp_path: Path) -> None:
    lines = [Line("many", [(float(x), 1.0) for x in range(20)], dashed=True)]
    draw([Panel("Constant", "x", "y", lines)], tmp_path / "p.png", caption="")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_logarithmic_axis_shows_plain_numbers(tmp_path: Path) -> None:
    lines = [Line("few", [(0.0, 1.0), (1.0, 90.0)])]
    draw([Panel("Powers", "x", "y", lines, log_y=True)], tmp_path / "p.svg", caption="")
    assert {"1", "2", "5", "10", "20", "50"} <= set(text_of(tmp_path / "p.svg").split())


def test_rows_are_appended_and_those_of_this_run_are_drawn(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.jsonl", tmp_path / "plot.svg"
    drawn: list[list[Row]] = []

    def panels(rows: list[Row]) -> list[Panel]:
        drawn.append(list(rows))
        return throughput_panels(rows)

    for _ in range(2):
        results = Results(out, plot, panels)
        for row in THROUGHPUT:
            results.write(row)
    assert [json.loads(line) for line in out.read_text().splitlines()] == THROUGHPUT * 2
    assert drawn[-1] == THROUGHPUT
    assert "tiny, a <GPU>" in text_of(plot)


def test_without_paths_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Results(None, None, throughput_panels).write(THROUGHPUT[0])
    assert not list(tmp_path.iterdir())


def test_a_row_without_numbers_draws_nothing(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    Results(None, plot, throughput_panels).write({"num_adapters": 3})
    assert not plot.exists()


@pytest.mark.parametrize(
    ("out", "plot", "message"),
    [
        ("none/out.jsonl", None, "no directory"),
        ("out.svg", None, "--out takes JSON lines"),
        (None, "plot.jpg", "ends in .svg or .png"),
        (None, "none/plot.svg", "no directory"),
    ],
)
def test_paths_are_checked_first(
    out: str | None, plot: str | None, message: str, tmp_path: Path
) -> None:
    paths = [None if name is None else tmp_path / name for name in (out, plot)]
    with pytest.raises(ConfigError, match=message):
        Results(*paths, throughput_panels)


def test_a_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it now fails
    Results(tmp_path / "out.jsonl", None, throughput_panels).write(THROUGHPUT[0])
    with pytest.raises(ConfigError, match=r"pip install 'loraplex\[bench\]'"):
        Results(None, tmp_path / "plot.svg", throughput_panels)


def test_table_shows_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(a=-3, b=8, c=3)
    table.add({"a": "x", "b": 1234.567, "c": None})
    assert capsys.readouterr().out == "a           b    c\nx    1,234.57    -\n"
