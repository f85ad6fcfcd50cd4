"""Adapters of another node: one copy a node, of the right bytes, within bounds."""

import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.engine.adapters.adapter_folders import AdapterFolders
from loraplex.engine.adapters.reader_error import ReaderError
from loraplex.engine.cluster.files import adapter_files
from loraplex.engine.cluster.files.adapter_files import AdapterFiles, FilePiece, FolderFile
from loraplex.engine.cluster.files.node_files import NodeFiles
from loraplex.engine.cluster.files.node_folders import NodeFolders
from loraplex.engine.cluster.files.session_folder import SessionFolder
from loraplex.engine.errors import AdapterError
from loraplex.engine.stores.disk_cache import DiskCache

WEIGHTS = "adapter_model.safetensors"


class OtherNode:
    """A node whose file system begins at `root`. `fail` is called before each piece is read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = AdapterFiles()
        self.num_pieces = 0
        self.fail = lambda: None

    def list_files(self, path: str) -> list[FolderFile]:
        return self.files.list_files(f"{self.root}{path}")

    def read(self, path: str, file: FolderFile, start: int) -> FilePiece:
        self.fail()
        self.num_pieces += 1
        return self.files.read(f"{self.root}{path}", file, start)

    def write(self, path: str, weights: bytes) -> None:
        folder = Path(f"{self.root}{path}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text('{"r": 4}')
        (folder / WEIGHTS).write_bytes(weights)
        (folder / "optimizer.pt").write_bytes(b"not for readers")


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OtherNode:
    monkeypatch.setattr(adapter_files, "PIECE_BYTES", 1000)
    node = OtherNode(tmp_path / "other")
    node.write("/adapters/a", bytes(range(250)) * 10)
    return node


def copies_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "." in path.name.strip("."))


def test_a_copy_has_the_bytes_of_the_original_and_is_made_once(
    other: OtherNode, tmp_path: Path
) -> None:
    nodes = [NodeFiles(other, DiskCache(tmp_path / "node", 10_000)) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: nodes[i % 3].open("/adapters/a"), range(6)))
    for copy in found:
        assert copy is not None
        assert (copy.path / WEIGHTS).read_bytes() == bytes(range(250)) * 10
        assert not (copy.path / "optimizer.pt").exists()
        copy.release()
    assert other.num_pieces == 1 + 3, "the configuration, and 2,500 bytes in pieces of 1,000"


def test_no_copy_is_made_where_nodes_share_a_file_system(other: OtherNode, tmp_path: Path) -> None:
    files = NodeFiles(AdapterFiles(), DiskCache(tmp_path / "node", 10_000))
    path = other.root / "adapters" / "a"
    assert files.open(str(path)) is None
    other.write("/adapters/a", b"changed")
    assert files.open(str(path)) is None, "both see the change"


def test_a_folder_of_equal_name_and_other_content_is_not_taken(
    other: OtherNode, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    other.write(str(mine), b"theirs")
    mine.mkdir()
    (mine / "adapter_config.json").write_text('{"r": 4}')
    (mine / WEIGHTS).write_bytes(b"stale!")
    copy = NodeFiles(other, DiskCache(tmp_path / "node", 10_000)).open(str(mine))
    assert copy is not None and (copy.path / WEIGHTS).read_bytes() == b"theirs"
    copy.release()


def test_a_retrained_adapter_is_copied_anew(other: OtherNode, tmp_path: Path) -> None:
    files = NodeFiles(other, DiskCache(tmp_path / "node", 10_000))
    old = files.open("/adapters/a")
    other.write("/adapters/a", b"new")
    new = files.open("/adapters/a")
    assert old is not None and new is not None
    assert (new.path / WEIGHTS).read_bytes() == b"new"
    assert len((old.path / WEIGHTS).read_bytes()) == 2500, "its reader goes on"


def test_files_that_change_under_way_are_an_error_and_leave_nothing(
    other: OtherNode, tmp_path: Path
) -> None:
    files = NodeFiles(other, DiskCache(tmp_path / "node", 10_000))
    other.fail = lambda: other.num_pieces == 2 and other.write("/adapters/a", b"x" * 2500)
    with pytest.raises(OSError, match="was replaced while it was read"):
        files.open("/adapters/a")
    assert copies_in(tmp_path / "node") == []
    other.fail = lambda: None
    copy = files.open("/adapters/a")
    assert copy is not None and (copy.path / WEIGHTS).read_bytes() == b"x" * 2500


def test_damaged_pieces_and_damaged_copies_are_found(other: OtherNode, tmp_path: Path) -> None:
    class Damaging(OtherNode):
        def read(self, path: str, file: FolderFile, start: int) -> FilePiece:
            return replace(super().read(path, file, start), data=b"?" * 1000)

    with pytest.raises(OSError, match="damaged on the way"):
        NodeFiles(Damaging(other.root), DiskCache(tmp_path / "node", 10_000)).open("/adapters/a")
    copy = NodeFiles(other, DiskCache(tmp_path / "node", 10_000)).open("/adapters/a")
    assert copy is not None
    (copy.path / WEIGHTS).write_bytes(b"damaged")
    copy.release()
    again = NodeFiles(other, DiskCache(tmp_path / "node", 10_000)).open("/adapters/a")
    assert again is not None and len((again.path / WEIGHTS).read_bytes()) == 2500


def test_copies_stay_within_their_bytes(other: OtherNode, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "node", 6000)
    files = NodeFiles(other, cache)
    for i in range(9):
        other.write(f"/adapters/{i}", bytes([i]) * 2500)
        copy = files.open(f"/adapters/{i}")
        assert copy is not None
        copy.release()
        assert cache.num_bytes <= 6000
    other.write("/adapters/large", b"x" * 7000)
    with pytest.raises(AdapterError, match=r"7,008 bytes, more than the 6,000 of adapter_cache"):
        files.open("/adapters/large")


@pytest.mark.parametrize("path", ["/adapters/none", "/adapters/a/adapter_config.json"])
def test_a_folder_that_is_nowhere_is_named(path: str, other: OtherNode, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{path} cannot be read on the router's node"):
        NodeFiles(other, DiskCache(tmp_path / "node", 10_000)).open(path)


@pytest.mark.parametrize("folders", ["root", "{tenant}"])
def test_no_file_outside_of_the_root_is_read(tmp_path: Path, folders: str) -> None:
    files = AdapterFiles([str(tmp_path / folders)])
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "a" / "adapter_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(PermissionError, match="leads out of"):
        files.list_files(str(root / "a"))
    os.unlink(root / "a" / "adapter_config.json")
    os.mkfifo(root / "a" / "adapter_config.json")
    with pytest.raises(PermissionError, match="no regular file"):
        files.list_files(str(root / "a"))


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Is short, as the path of a socket must be."""
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setattr("tempfile.tempdir", path)
        yield Path(path)


def test_workers_get_folders_that_stay_while_they_read(other: OtherNode, temporary: Path) -> None:
    served = NodeFolders(other, session="s", max_bytes=3000)
    folders = AdapterFolders(served.address)
    other.write("/adapters/b", b"b" * 2500)
    with folders.open("/adapters/a") as folder:
        assert len((folder / WEIGHTS).read_bytes()) == 2500
        reading = threading.Event()

        def read_other() -> None:
            with folders.open("/adapters/b") as other_folder:
                assert (other_folder / WEIGHTS).read_bytes() == b"b" * 2500
                reading.set()

        thread = threading.Thread(target=read_other)
        thread.start()
        assert not reading.wait(0.2), "there is room for one of them"
        assert folder.exists()
    thread.join(9)
    assert reading.is_set()
    with (
        pytest.raises(AdapterError, match=r"^/adapters/a is bad$"),
        folders.open("/adapters/a") as f,
    ):
        raise AdapterError(f"{f} is bad")
    with (
        pytest.raises(AdapterError, match="/adapters/none cannot be read"),
        folders.open("/adapters/none"),
    ):
        pass
    other.fail = lambda: (_ for _ in ()).throw(OSError("its node has died"))
    with (
        pytest.raises(ReaderError, match="/adapters/b: its node has died"),
        folders.open("/adapters/b"),
    ):
        pass
    served.close()
    assert list(temporary.iterdir()) == []
    with pytest.raises(ReaderError, match="cannot be asked for"), folders.open("/adapters/a"):
        pass


def test_the_last_user_of_a_session_removes_its_folder(temporary: Path) -> None:
    first, second = SessionFolder("s"), SessionFolder("s")
    first.close()
    assert second.path.exists()
    other_session = SessionFolder("t")
    assert second.path.exists(), "another session takes only what nobody uses"
    second.close()
    second.close()
    assert not second.path.exists() and other_session.path.exists()


def test_folders_of_killed_engines_are_removed_by_the_next_session(temporary: Path) -> None:
    pid = os.fork()
    if not pid:
        SessionFolder("killed")
        os._exit(9)
    os.waitpid(pid, 0)
    assert [path.name for path in temporary.iterdir()] == ["loraplex-adapters-killed"]
    next_one = SessionFolder("next")
    assert list(temporary.iterdir()) == [next_one.path]
