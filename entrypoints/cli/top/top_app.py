"""The terminal program of `loraplex top`."""

from collections import deque
from typing import Any

from rich.text import Text
from textual.app import App, ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import DataTable, Footer, Sparkline, Static

from loraplex.engine.errors import LoraplexError
from loraplex.entrypoints.cli.top.live_source import LiveSource, View
from loraplex.entrypoints.cli.top.pool_text import FIXED, AdapterColors, cells_shown, pool_text

NUM_RATES = 120  # one minute
COLUMNS = ("adapter", "tier", "users", "run", "wait", "rank", "pages", "MB", "loads", "load ms",
           "first ms", "used")  # fmt: skip
TIERS = ("pages", "loading", "host", "disk")


class TopApp(App[None]):
    """Follows a source in a thread, and shows each of its views.

    Attributes:
        error: why the source has ended; None while it has not.
    """

    TITLE = "loraplex top"
    BINDINGS = [("q", "quit", "Quit"), ("p", "pause", "Pause or go on")]
    CSS = """
    #head { height: 1; padding: 0 1; background: $panel; }
    #figures { height: 4; margin: 1 1 0 1; }
    #rate { width: 2fr; }
    #figures Static { width: 1fr; }
    #rate Static { width: 100%; }
    #rate Sparkline { height: 2; }
    Sparkline > .sparkline--max-color { color: #7fa7f2; }
    Sparkline > .sparkline--min-color { color: #33507f; }
    #legend { height: 1; margin: 1 1 0 1; }
    #pool { height: auto; max-height: 40%; margin: 0 1; }
    #adapters { height: 1fr; margin: 1 1 0 1; }
    """

    def __init__(self, source: LiveSource) -> None:
        super().__init__()
        self.error: LoraplexError | None = None
        self._source = source
        self._rates: deque[float] = deque([0.0], maxlen=NUM_RATES)
        self._colors = AdapterColors()
        self._is_paused = False
        self._view: View | None = None

    def compose(self) -> ComposeResult:
        yield Static("Connecting", id="head", markup=False)
        with Horizontal(id="figures"):
            with Vertical(id="rate"):
                yield Static(id="tokens", markup=False)
                yield Sparkline([0.0], id="spark", summary_function=max)
            yield Static(id="requests", markup=False)
            yield Static(id="first-token", markup=False)
        yield Static(id="legend")
        yield Static(id="pool")
        yield DataTable(id="adapters", cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        table = self.query_one(DataTable)
        for title in COLUMNS:
            table.add_column(title, key=title)
        table.focus()
        self.run_worker(self._follow, thread=True)

    def on_resize(self) -> None:
        if self._view is not None:
            self._show_pools(self._view["pools"])

    def action_pause(self) -> None:
        self._is_paused = not self._is_paused
        self.query_one("#head", Static).set_class(self._is_paused, "paused")
        if self._view is not None:
            self._show_head(self._view)

    def _follow(self) -> None:
        try:
            for view in self._source.views():
                if not self.is_running:
                    return
                self.call_from_thread(self.show, view)
        except LoraplexError as error:
            self.error = error
            self.call_from_thread(self.exit)

    def show(self, view: View) -> None:
        """Shows a view, unless the user has paused."""
        self._rates.append(view["rates"]["generated_tokens"])
        if self._is_paused:
            return
        self._view = view
        self._show_head(view)
        self._show_figures(view)
        self._show_pools(view["pools"])
        self._show_adapters(view["adapters"])

    def _show_head(self, view: View) -> None:
        counts, paused = view["adapter_counts"], "   PAUSED" if self._is_paused else ""
        self.query_one("#head", Static).update(
            f"{view['model']}   {counts['num_resident_adapters']:,} of "
            f"{counts['registered_adapters']:,} adapters in pages, "
            f"{counts['host_adapters']:,} in host memory{paused}"
        )

    def _show_figures(self, view: View) -> None:
        load, first = view["load"], view["first_token"]
        over = "all time" if first["window_s"] is None else f"{first['window_s']:.0f} s"
        texts = {
            "#tokens": f"new tokens/s   {self._rates[-1]:,.0f}   "
            f"(most in a minute {max(self._rates):,.0f})",
            "#requests": f"running   {load['running']:,}\nwaiting   {load['waiting']:,}\n"
            f"  for an adapter {load['waiting_for_adapter']:,}",
            "#first-token": f"first token ({over})\n50 %  {_ms(first['p50_ms'])}\n"
            f"90 %  {_ms(first['p90_ms'])}\n99 %  {_ms(first['p99_ms'])}",
        }
        for where, text in texts.items():
            self.query_one(where, Static).update(text)
        self.query_one(Sparkline).data = list(self._rates)

    def _show_pools(self, pools: list[dict[str, Any]]) -> None:
        width = max(10, self.size.width - 2)
        height = max(1, int(self.size.height * 0.3) // max(1, len(pools)))
        drawn = [pool_text(pool, width, height, self._colors) for pool in pools]
        self.query_one("#pool", Static).update(Text("\n").join(drawn))
        num_pages = max((cells_shown(p, width * 2 * height)[1] for p in pools), default=1)
        legend = Text.assemble(
            ("■", FIXED[1]), " KV cache  ", ("■", FIXED[2]), " prefix cache  ",
            ("■", "#d97a2b"), ("■", "#3f9a63"), " adapters  ", ("■", FIXED[0]), " free   ",
            "one cell a page" if num_pages == 1 else f"a cell shows the first of {num_pages} pages",
        )  # fmt: skip
        self.query_one("#legend", Static).update(legend)

    def _show_adapters(self, adapters: list[dict[str, Any]]) -> None:
        """Keeps the row of the cursor where the table's order does not change."""
        table = self.query_one(DataTable)
        adapters = sorted(adapters, key=lambda row: (TIERS.index(row["tier"]), row["name"]))
        if [row["name"] for row in adapters] != [key.value for key in table.rows]:
            row = table.cursor_row
            table.clear()
            for adapter in adapters:
                table.add_row(*self._cells(adapter), key=adapter["name"])
            table.move_cursor(row=min(row, max(0, len(adapters) - 1)))
            return
        for adapter in adapters:
            for title, cell in zip(COLUMNS, self._cells(adapter), strict=True):
                if table.get_cell(adapter["name"], title) != cell:
                    table.update_cell(adapter["name"], title, cell, update_width=True)

    def _cells(self, row: dict[str, Any]) -> list[Text]:
        in_pages = row["tier"] in ("pages", "loading")
        name = Text.assemble(("■ " if in_pages else "  ", self._colors.of(row["content_hash"])
                              if in_pages else ""), row["name"])  # fmt: skip
        if row["pinned"]:
            name.append(" (pinned)")
        is_read, used = bool(row["content_hash"]), row["seconds_since_use"]
        texts = [
            f"{row['num_users']:,}", f"{row['num_running']:,}", f"{row['num_waiting']:,}",
            f"{row['max_rank']}" if is_read else "", f"{row['num_pages']:,}" if is_read else "",
            f"{row['num_bytes'] / 1e6:.1f}" if is_read else "", f"{row.get('num_loads', 0):,}",
            f"{row['load_mean_ms']:,.1f}" if row.get("num_loads") else "",
            f"{row['ttft_p50_ms']:,.0f}" if row.get("ttft_p50_ms") else "",
            "never" if used is None else f"{used:,.0f} s" if used >= 1 else "now",
        ]  # fmt: skip
        right = [Text(text, justify="right") for text in texts]
        return [name, Text("failed" if row["error"] else row["tier"]), *right]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"
