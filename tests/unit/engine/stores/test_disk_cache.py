"""The cache of downloads: its bound, its users, and processes that share or leave it."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.engine.stores.deadline import Deadline, StoreTimeoutError
from loraplex.engine.stores.disk_cache import DiskCache, PartialFolder
from loraplex.engine.stores.locked_folder import LockedFolder

NOW, SOON = 1e-9, 30.0


def fill(cache: DiskCache, key: str, num_bytes: int, version: str = "v") -> LockedFolder:
    """Puts an entry of this size into the cache; raises StoreTimeoutError if there is no room."""
    place = cache.reserve(key, version, num_bytes, Deadline(0.2))
    if isinstance(place, LockedFolder):
        return place
    (place.path / "data").write_bytes(b"x" * num_bytes)
    return place.commit()


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("data"))


@pytest.mark.parametrize("seed", range(3))
def test_random_uses_never_exceed_the_bytes(tmp_path: Path, seed: int) -> None:
    """A thousand names, room for some twenty, two processes' caches, leases held at random."""
    rng = random.Random(seed)
    caches = [DiskCache(tmp_path, 2000) for _ in range(2)]
    held: list[tuple[LockedFolder, int]] = []
    for _ in range(600):
        cache = rng.choice(caches)
        name = f"{min(int(rng.expovariate(1 / 60)), 999):03}"
        size = 50 + 100 * (int(name) % 2)
        if rng.random() < 0.4 and held:
            held.pop(rng.randrange(len(held)))[0].release()
        if len(held) > 8:
            continue
        folder = cache.open(name, "v") or fill(cache, name, size)
        held.append((folder, size))
        assert bytes_on_disk(tmp_path) <= cache.num_bytes <= 2000
        for lease, num_bytes in held:
            assert (lease.path / "data").stat().st_size == num_bytes
    for lease, _ in held:
        lease.release()


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 300)
    for name in "abc":
        fill(cache, name, 100).release()
    again = cache.open("a")
    assert again is not None
    again.release()
    fill(cache, "d", 100).release()
    found = {name for name in "abcd" if (folder := cache.open(name)) and not folder.release()}
    assert found == {"a", "c", "d"}


def test_a_folder_in_use_stays_and_its_user_is_waited_for(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 100)
    used = fill(cache, "a", 100)
    with pytest.raises(StoreTimeoutError):
        cache.reserve("b", "v", 100, Deadline(0.2))
    assert (used.path / "data").exists()
    used.release()
    place = cache.reserve("b", "v", 100, Deadline(SOON))
    assert isinstance(place, PartialFolder)
    assert not used.path.exists()
    place.discard()
    assert cache.num_bytes == 0


def test_a_download_counts_from_its_begin_and_is_not_seen(tmp_path: Path) -> None:
    cache, other = DiskCache(tmp_path, 100), DiskCache(tmp_path, 100)
    place = cache.reserve("a", "v", 60, Deadline(SOON))
    assert isinstance(place, PartialFolder)
    assert other.num_bytes == 60
    assert other.open("a") is None
    with pytest.raises(StoreTimeoutError):
        other.reserve("b", "v", 60, Deadline(0.2))
    with pytest.raises(StoreTimeoutError):
        other.reserve("a", "v", 60, Deadline(0.2))
    place.commit().release()
    found = other.reserve("a", "v", 60, Deadline(NOW))
    assert isinstance(found, LockedFolder)
    found.release()


def test_versions_are_apart_and_the_latest_use_is_found_without_one(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    for version in ("v1", "v2"):
        fill(cache, "a", 10, version).release()
    for version in ("v1", "v2"):
        folder = cache.open("a", version)
        assert folder is not None
        assert f".{version}." in folder.path.name
        folder.release()
    assert cache.open("a", "v3") is None
    latest = cache.open("a")
    assert latest is not None
    assert ".v2." in latest.path.name
    latest.release()


def test_what_a_killed_process_held_is_free_again(tmp_path: Path) -> None:
    """The child reserves the whole cache, begins to write, and is killed."""
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from loraplex.engine.stores.deadline import Deadline\n"
        "from loraplex.engine.stores.disk_cache import DiskCache\n"
        "place = DiskCache(Path(sys.argv[1]), 100).reserve('a', 'v', 100, Deadline(9))\n"
        "(place.path / 'data').write_bytes(b'x' * 50)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], check=False)
    cache = DiskCache(tmp_path, 100)
    assert cache.num_bytes == 100
    fill(cache, "b", 100).release()
    assert bytes_on_disk(tmp_path) == cache.num_bytes == 100


def test_entries_survive_a_restart_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    fill(DiskCache(tmp_path, 100), "a", 100).release()
    (tmp_path / "notes.txt").write_text("mine")
    cache = DiskCache(tmp_path, 100)
    again = cache.open("a", "v")
    assert again is not None
    again.release()
    fill(cache, "b", 100).release()
    assert (tmp_path / "notes.txt").read_text() == "mine"
