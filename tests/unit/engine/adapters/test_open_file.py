"""Opens the file that was asked for, also when paths change between check and use."""

import errno
import os
import stat
from pathlib import Path

import pytest

from loraplex.engine.adapters import open_file
from loraplex.engine.adapters.open_file import (
    NotRegularFileError,
    OutsideRootError,
    open_regular_file,
)
from loraplex.engine.adapters.peft_config import PeftConfigError, read_peft_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with an adapter, and a secret beside it."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "file").write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    return root


@pytest.fixture(params=["openat2", "fallback"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the system call of Linux 5.6."""
    if request.param == "fallback":
        monkeypatch.setattr(open_file, "OPENAT2", -1)
    return str(request.param)


def read(path: Path, root: Path | str) -> str:
    with open_regular_file(path, str(root)) as descriptor:
        return os.read(descriptor, 100).decode()


def test_a_file_in_the_root_is_opened(root: Path, kernel: str) -> None:
    assert read(root / "a" / "file", root) == "mine"
    with pytest.raises(FileNotFoundError):
        read(root / "a" / "none", root)
    with pytest.raises(NotRegularFileError):
        read(root / "a", root)


@pytest.mark.parametrize("target", ["../../outside/file", "{outside}/file"])
def test_a_file_that_became_a_link_out_of_the_root_is_refused(
    root: Path, kernel: str, target: str
) -> None:
    path = root / "a" / "file"
    path.unlink()
    path.symlink_to(target.format(outside=root.parent / "outside"))
    assert path.read_text() == "secret"
    with pytest.raises(OutsideRootError, match="adapter_root"):
        read(path, root)


def test_a_folder_that_became_a_link_out_of_the_root_is_refused(root: Path, kernel: str) -> None:
    (root / "a").rename(root / "b")
    (root / "a").symlink_to(root.parent / "outside")
    with pytest.raises(OutsideRootError, match="adapter_root"):
        read(root / "a" / "file", root)


def test_links_that_stay_in_the_root_are_followed(root: Path) -> None:
    (root / "b").symlink_to("a")
    (root / "a" / "link").symlink_to("file")
    try:
        assert read(root / "b" / "link", root) == "mine"
    except OutsideRootError as error:  # a kernel without openat2
        assert error.errno == errno.ELOOP


def test_paths_outside_the_root_are_the_operators(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root.parent / "outside")
    assert read(link / "file", root) == "secret"
    assert read(link / "file", "") == "secret"


def test_a_pipe_does_not_hang_even_if_it_comes_after_the_check(root: Path, kernel: str) -> None:
    path = root / "a" / "adapter_config.json"
    os.mkfifo(path)
    for beneath in ("", str(root)):
        with pytest.raises(PeftConfigError, match="no regular file"):
            read_peft_config(root / "a", beneath)
    assert stat.S_ISFIFO(path.stat().st_mode)
