"""Small JSON files in the run directory, each written by one process and read by others."""

import os
from pathlib import Path
from typing import Any

import msgspec


def write_json(path: Path, value: Any) -> None:
    """Replaces the file as a whole, so a reader never sees half of it."""
    draft = path.with_suffix(".new")
    draft.write_bytes(msgspec.json.encode(value))
    os.replace(draft, path)
