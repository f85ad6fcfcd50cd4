from pathlib import Path

import pytest

from loraplex.memory.free_memory import available_bytes


def write(root: Path, **files: str) -> None:
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 50 kB\n")
    return tmp_path


def test_the_kernels_estimate_counts_where_nothing_limits_the_process(root: Path) -> None:
    assert available_bytes(root) == 50 << 10
    write(root, max="max", current="5000", stat="anon 9\ninactive_file 300\n")
    assert available_bytes(root) == 50 << 10


def test_the_limit_of_a_container_counts(root: Path) -> None:
    write(root, max="6000\n", current="5000", stat="anon 9\ninactive_file 300\n")
    assert available_bytes(root) == 1300
    write(root, max="4000\n")
    assert available_bytes(root) == 0
    write(root, max=str(1 << 40))
    assert available_bytes(root) == 50 << 10


def test_this_machine_has_memory(tmp_path: Path) -> None:
    assert 1 << 20 < available_bytes() < 1 << 50
    assert 1 << 20 < available_bytes(tmp_path) < 1 << 50  # without proc: all memory
