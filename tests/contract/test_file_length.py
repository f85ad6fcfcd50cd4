"""A file that outgrows 400 lines holds two things."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400
FOLDERS = ("engine", "backends", "memory", "scheduler", "entrypoints", "tests", "examples")
FILES = sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_file_is_short(file: Path) -> None:
    num_lines = len(file.read_text().splitlines())
    assert num_lines <= LIMIT, f"{num_lines} lines"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
