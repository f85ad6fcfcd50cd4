"""Counts the entries of a JSON text without building them."""

import re

_ESCAPE = re.compile(rb"\\.", re.DOTALL)


def num_separators(text: bytes) -> int:
    """Returns the number of commas and of opening brackets and braces."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


class EntryCounter:
    """Counts separators outside strings, piece by piece, in time that grows with the pieces alone.

    The count of a text that is no JSON means nothing.
    """

    def __init__(self) -> None:
        self.num_entries = 0
        self._is_inside = 0  # 1 where the last piece has ended within a string
        self._rest = b""  # a backslash at the end of the last piece

    def add(self, piece: bytes) -> None:
        """Counts the next bytes of the text."""
        text = _ESCAPE.sub(b"", self._rest + piece)
        self._rest = b"\\" if text.endswith(b"\\") else b""
        parts = text.removesuffix(b"\\").split(b'"')
        self.num_entries += num_separators(b"".join(parts[self._is_inside :: 2]))
        self._is_inside = (self._is_inside + len(parts) - 1) % 2
