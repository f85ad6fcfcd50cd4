"""Draws a map of the page pool as text, two cells in each character."""

import colorsys
from itertools import groupby, zip_longest
from typing import Any

from rich.style import Style
from rich.text import Text

FREE, KV, PREFIX, FIRST_SLOT = range(4)
"""Codes of cells; FIRST_SLOT + s is an adapter in slot s."""

FIXED = {FREE: "#3a3f48", KV: "#5f8fea", PREFIX: "#33507f"}
_GOLDEN_ANGLE = 137.508
_FIRST_HUE, _HUES = 290.0, 250.0  # degrees; the blues belong to the KV cache
_UPPER_HALF = "▀"


class AdapterColors:
    """A color for each content hash, the same for as long as the program runs."""

    def __init__(self) -> None:
        self._colors: dict[str, str] = {}

    def of(self, content_hash: str) -> str:
        """Returns a color as #rrggbb."""
        number = len(self._colors)
        if content_hash not in self._colors:
            hue = (_FIRST_HUE + (number * _GOLDEN_ANGLE + 100) % _HUES) % 360
            lightness = 0.55 + 0.07 * (number % 3)
            parts = colorsys.hls_to_rgb(hue / 360, lightness, 0.6)
            self._colors[content_hash] = "#" + "".join(f"{round(255 * p):02x}" for p in parts)
        return self._colors[content_hash]


def cells_shown(pool: dict[str, Any], max_cells: int) -> tuple[list[int], int]:
    """Returns the codes of at most `max_cells` cells, and the pages that each one stands for."""
    runs = pool["runs"]
    codes = [code for code, count in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)]
    step = max(1, -(-len(codes) // max_cells))
    return codes[::step], step * int(pool["pages_per_cell"])


def pool_text(pool: dict[str, Any], width: int, height: int, colors: AdapterColors) -> Text:
    """Returns at most `height` lines of `width` characters, in order of page ids."""
    codes, _ = cells_shown(pool, width * 2 * height)
    text = Text(no_wrap=True)
    for first in range(0, len(codes), 2 * width):
        upper, lower = codes[first : first + width], codes[first + width : first + 2 * width]
        for (above, below), cells in groupby(zip_longest(upper, lower)):
            style = Style(
                color=_color(pool, above, colors),
                bgcolor=None if below is None else _color(pool, below, colors),
            )
            text.append(_UPPER_HALF * sum(1 for _ in cells), style)
        text.append("\n")
    text.right_crop(1)
    return text


def _color(pool: dict[str, Any], code: int, colors: AdapterColors) -> str:
    if code < FIRST_SLOT:
        return FIXED[code]
    slot = pool["slots"].get(str(code - FIRST_SLOT))
    return colors.of(slot["content_hash"]) if slot else "#888888"
