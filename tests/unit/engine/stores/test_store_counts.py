"""The counts of a store, against downloads from fsspec's file system in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engine.errors import ClientError
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.store_config import StoreConfig
from loraplex.engine.stores.open_stores import cache_bytes, make_store_lookup
from loraplex.engine.stores.store_counts import StoreCounts

from helpers.running.processes import wait_until

fsspec = pytest.importorskip("fsspec")
BYTES = 100  # of an adapter


@pytest.fixture
def files() -> Iterator[object]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/counts", recursive=True)


def put(files: object, name: str, num_bytes: int = BYTES) -> None:
    files.pipe(f"/counts/{name}/adapter_config.json", b"{}")  # type: ignore[attr-defined]
    weights = bytes(num_bytes - 2)
    files.pipe(f"/counts/{name}/adapter_model.safetensors", weights)  # type: ignore[attr-defined]


def test_lookups_downloads_and_evictions_are_counted(files: object, tmp_path: Path) -> None:
    """The cache has room for two adapters; four are asked for, one of them twice."""
    for name in ("a", "b", "c"):
        put(files, name)
    put(files, "large", 3 * BYTES)
    config = StoreConfig(
        adapter_stores=("memory://counts",),
        adapter_cache_dir=str(tmp_path / "cache"),
        adapter_cache_bytes=2 * BYTES,
    )
    counts = StoreCounts()
    lookup = make_store_lookup(config, Wakeup(), counts)
    assert lookup is not None
    for name in ("a", "b", "c", "c", "large", "nobody"):
        answers: list[object] = []
        lookup.find(name, "", answers.append)
        wait_until(lambda answers=answers: [lookup.run_ready(), answers][1])  # type: ignore[misc]
        lease = getattr(answers[0], "lease", None)
        if lease is not None:
            lease.release()
        else:
            assert isinstance(answers[0], ClientError | None)
    lookup.close()
    found = counts.snapshot()
    assert found["lookups"] == {"found": 3, "missing": 1, "refused": 1, "unavailable": 0}
    assert found["download_seconds"]["count"] == 3
    assert found["download_bytes"] == 3 * BYTES
    assert (found["evictions"], found["failed_downloads"]) == (1, 0)
    assert cache_bytes(config) == 2 * BYTES


def test_a_store_of_folders_has_no_cache(tmp_path: Path) -> None:
    config = StoreConfig(adapter_stores=(str(tmp_path),), adapter_cache_dir=str(tmp_path / "no"))
    assert cache_bytes(config) is None
    assert not (tmp_path / "no").exists()
