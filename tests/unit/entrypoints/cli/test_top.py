"""`loraplex top`: the terminal program over made-up views, and the command's errors."""

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Static

from loraplex.engine.errors import EngineDeadError
from loraplex.entrypoints.cli import main as cli
from loraplex.entrypoints.cli.top.pool_text import FIXED, AdapterColors, cells_shown, pool_text
from loraplex.entrypoints.cli.top.top_app import TopApp
from loraplex.entrypoints.live.live_feed import LiveFeed


def make_view(*, tier: str = "pages", pages: int = 3, tokens: int = 0) -> dict[str, Any]:
    feed = LiveFeed("base")
    in_pages = tier == "pages"
    resident = {
        "content_hash": "h", "names": ["<script>[b]x"], "num_pages": pages, "adapter_slot": 4,
        "residency": "resident", "pinned": True, "num_users": 2,
    }  # fmt: skip
    row = {
        "name": "<script>[b]x", "tier": tier, "content_hash": "h", "usage": {"num_loads": 1,
        "load_mean_ms": 12.5, "load_max_ms": 12.5}, "pinned": True, "num_running": 1,
        "num_waiting": 1, "max_rank": 8, "num_pages": pages, "num_bytes": 2_000_000, "error": "",
        "seconds_since_use": None,
    }  # fmt: skip
    runs = [1, 2, 2, 1, 7, pages, 0, 20 - pages] if in_pages else [0, 23]
    feed.add_list([row])
    feed.add_stats({
        "running": 5, "waiting": 7, "num_generated_tokens": tokens, "num_resident_adapters": 1,
        "registered_adapters": 9, "resident_adapters": [resident] if in_pages else [],
        "pools": [{"engine": "", "num_pages": 23, "pages_per_cell": 1, "runs": runs}],
    })  # fmt: skip
    return feed.view()


class Views:
    """A source that shows given views, then fails or waits for its end."""

    def __init__(self, *views: dict[str, Any], error: str = "") -> None:
        self._views = views
        self._error = error

    def __enter__(self) -> "Views":
        return self

    def __exit__(self, *exc_info: object) -> None: ...

    def views(self) -> Iterator[dict[str, Any]]:
        yield from self._views
        if self._error:
            raise EngineDeadError(self._error)


def text_of(app: TopApp, where: str) -> str:
    return str(app.query_one(where, Static).render())


def table_of(app: TopApp) -> list[list[str]]:
    table = app.query_one(DataTable)
    return [[str(cell) for cell in table.get_row_at(i)] for i in range(table.row_count)]


def test_the_terminal_shows_load_pool_and_adapters() -> None:
    async def run() -> None:
        app = TopApp(Views(make_view()))
        async with app.run_test(size=(100, 30)) as pilot:
            await app.workers.wait_for_complete()
            await pilot.pause()
            assert "1 of 9 adapters in pages" in text_of(app, "#head")
            assert "running   5" in text_of(app, "#requests")
            (row,) = table_of(app)
            assert row[:5] == ["■ <script>[b]x (pinned)", "pages", "2", "1", "1"]
            assert row[5:10] == ["8", "3", "2.0", "1", "12.5"]
            app.show(make_view(tier="disk"))
            await pilot.pause()
            (row,) = table_of(app)
            assert row[:3] == ["  <script>[b]x (pinned)", "disk", "0"]
            await pilot.press("p")
            app.show(make_view())
            await pilot.pause()
            assert table_of(app) == [row] and "PAUSED" in text_of(app, "#head")
            await pilot.press("q")
        assert app.error is None

    asyncio.run(run())


def test_the_program_ends_with_the_reason_of_its_source() -> None:
    async def run() -> TopApp:
        app = TopApp(Views(make_view(), error="the engine was stopped"))
        async with app.run_test() as pilot:
            while app.error is None:
                await pilot.pause(0.01)
        return app

    assert str(asyncio.run(run()).error) == "the engine was stopped"


def test_each_page_has_its_color() -> None:
    colors = AdapterColors()
    (pool,) = make_view()["pools"]
    text = pool_text(pool, 4, 9, colors)
    assert text.plain == "▀▀▀▀\n▀▀▀▀\n▀▀▀▀"
    seen: dict[int, tuple[str | None, str | None]] = {}
    for span in text.spans:
        style = span.style
        assert not isinstance(style, str)
        top = style.color.name if style.color else None
        colors_shown = (top, style.bgcolor.name if style.bgcolor else None)
        seen |= dict.fromkeys(range(span.start, span.end), colors_shown)
    own = colors.of("h")
    assert seen[0] == (FIXED[1], own) and seen[2] == (FIXED[2], FIXED[0])
    assert seen[3] == (own, FIXED[0])
    assert [seen[place][1] for place in (10, 12, 13)] == [FIXED[0], FIXED[0], None]


@pytest.mark.parametrize("max_cells", [1, 5, 22, 23, 500])
def test_fewer_cells_stand_for_more_pages(max_cells: int) -> None:
    (pool,) = make_view()["pools"]
    codes, pages = cells_shown(pool, max_cells)
    assert len(codes) <= max_cells and len(codes) * pages >= 23 > (len(codes) - 1) * pages


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "loraplex.entrypoints.cli.top.top.find_spec",
        lambda name: importlib.util.find_spec("no_" + name),
    )
    assert cli.main(["top"]) == 2
    assert "pip install 'loraplex[top]'" in capsys.readouterr().err


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "http://127.0.0.1:1"])
def test_without_a_server_the_command_says_how_to_start_one(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", "--endpoint", endpoint]) == 1
    error = capsys.readouterr().err
    assert f"no server answers at {endpoint}" in error and "`loraplex serve" in error


def test_a_key_file_is_for_http_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("k")
    assert cli.main(["top", "--json", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "http://" in capsys.readouterr().err


def test_views_are_plain_json() -> None:
    view = make_view()
    assert json.loads(json.dumps(view)) == view
