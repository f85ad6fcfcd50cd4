"""docs/design/processes.md names every message between processes."""

from pathlib import Path

from loraplex.engine.ipc.wire_types import WIRE_TYPES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "design" / "processes.md"


def test_every_message_is_in_the_table() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    table = "\n".join(rows)
    missing = [kind.__name__ for kind in WIRE_TYPES if kind.__name__ not in table]
    assert not missing, f"name these in the table of messages: {missing}"
