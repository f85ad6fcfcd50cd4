"""Routers see every change of the list of engines."""

import os
from pathlib import Path

import msgspec

from loraplex.engine.cluster.engine_list import (
    FILE_NAME,
    EngineList,
    EngineListReader,
    ListedEngine,
)


def test_a_change_within_one_tick_of_the_file_systems_clock_is_seen(tmp_path: Path) -> None:
    """The file that replaces it may get the inode of the one before the last."""
    reader, path = EngineListReader(tmp_path), tmp_path / FILE_NAME
    assert reader.read() is None
    for i in range(3):
        engines = EngineList("affinity", [ListedEngine(f"engine-{i}", "ipc://x")])
        path.write_bytes(msgspec.json.encode(engines))
        os.utime(path, ns=(0, 0))
        assert reader.read() == engines
        assert reader.read() is None
