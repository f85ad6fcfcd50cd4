"""Downloads from a real S3 server: cut, slow, replaced, damaged, too large, gone."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engine.errors import ClientError
from loraplex.engine.stores.adapter_store import UNAVAILABLE, FoundAdapter
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.disk_cache import DiskCache
from loraplex.engine.stores.remote_store import RemoteStore
from loraplex.engine.stores.store_address import StoreAddress

from helpers.stores.s3_server import BUCKET, Line, S3Server, line_to, options_for

pytestmark = pytest.mark.e2e
MIB = 1 << 20


@pytest.fixture
def line(s3: S3Server) -> Iterator[Line]:
    with line_to(s3.url) as line:
        yield line


def open_store(line: Line, folder: Path, prefix: str, max_bytes: int = 64 * MIB) -> RemoteStore:
    address = StoreAddress.parse(f"s3://{BUCKET}/{prefix}")
    cache = DiskCache(folder, 64 * MIB)
    return RemoteStore(address, cache, max_bytes=max_bytes, options=options_for(line.url))


def find(store: RemoteStore, name: str, seconds: float = 60) -> FoundAdapter | None:
    return store.find(name, "", Deadline(seconds))


def weights_of(answer: FoundAdapter | None) -> bytes:
    """Returns the downloaded weights, and lets go of the files."""
    assert answer is not None
    data = (Path(answer.source.path) / "adapter_model.safetensors").read_bytes()
    assert answer.lease is not None
    answer.lease.release()
    return data


def test_a_cut_download_goes_on(s3: S3Server, line: Line, tmp_path: Path) -> None:
    """Each cut comes after 64 KiB of an answer; 9 MiB are three ranges."""
    weights = os.urandom(9 * MIB)
    s3.put_adapter("cuts/legal", weights=weights)
    line.cut_after, line.num_cuts_left = 1 << 16, 7
    assert weights_of(find(open_store(line, tmp_path, "cuts"), "legal")) == weights
    assert line.num_cuts_left == 0


def test_a_line_that_cuts_every_answer_ends_with_the_reason(
    s3: S3Server, line: Line, tmp_path: Path
) -> None:
    s3.put_adapter("always/legal", weights=os.urandom(2 * MIB))
    line.cut_after, line.num_cuts_left = 1 << 15, 1000
    store = open_store(line, tmp_path, "always")
    with pytest.raises(ClientError, match="always/legal: the download failed") as error:
        find(store, "legal")
    assert error.value.code == UNAVAILABLE
    assert DiskCache(tmp_path, MIB).num_bytes == 0
    line.num_cuts_left = 0
    assert len(weights_of(find(store, "legal"))) == 2 * MIB


def test_a_slow_line_meets_the_time_limit(s3: S3Server, line: Line, tmp_path: Path) -> None:
    s3.put_adapter("slow/legal", weights=os.urandom(2 * MIB))
    line.bytes_per_s = 200_000.0  # ten seconds in all
    with pytest.raises(ClientError, match="took longer than the 2 s") as error:
        find(open_store(line, tmp_path, "slow"), "legal", seconds=2)
    assert error.value.code == UNAVAILABLE
    assert DiskCache(tmp_path, MIB).num_bytes == 0


def test_a_copy_in_the_cache_is_not_downloaded_again(
    s3: S3Server, line: Line, tmp_path: Path
) -> None:
    s3.put_adapter("twice/legal", weights=b"first")
    assert weights_of(find(open_store(line, tmp_path, "twice"), "legal")) == b"first"
    line.cut_after, line.num_cuts_left = 1 << 12, 1000  # only lists and heads come through
    again = open_store(line, tmp_path, "twice")  # another process
    assert weights_of(find(again, "legal")) == b"first"
    line.num_cuts_left = 0
    s3.put_adapter("twice/legal", weights=b"other")  # as long as before
    assert weights_of(find(again, "legal")) == b"other"
    s3.remove("twice/legal")
    assert find(again, "legal") is None


def test_a_store_that_is_down_leaves_what_is_in_the_cache(
    s3: S3Server, line: Line, tmp_path: Path
) -> None:
    s3.put_adapter("down/legal", weights=b"copy")
    weights_of(find(open_store(line, tmp_path, "down"), "legal"))
    line.is_dead = True
    store = open_store(line, tmp_path, "down")
    assert weights_of(find(store, "legal", seconds=2)) == b"copy"
    with pytest.raises(ClientError, match="down/other: the store does not answer") as error:
        find(store, "other", seconds=2)
    assert error.value.code == UNAVAILABLE


def test_a_damaged_copy_is_replaced(s3: S3Server, line: Line, tmp_path: Path) -> None:
    s3.put_adapter("damage/legal", weights=b"intact")
    answer = find(open_store(line, tmp_path, "damage"), "legal")
    assert answer is not None
    file = Path(answer.source.path) / "adapter_model.safetensors"
    weights_of(answer)
    file.write_bytes(b"broken")
    assert weights_of(find(open_store(line, tmp_path, "damage"), "legal")) == b"intact"


def test_files_that_are_replaced_meanwhile_are_not_mixed(
    s3: S3Server, line: Line, tmp_path: Path
) -> None:
    """The weights are replaced while they are downloaded over a slow line."""
    old, new = b"a" * (6 * MIB), b"b" * (6 * MIB)
    s3.put_adapter("mixed/legal", weights=old)
    line.bytes_per_s = 4e6
    timer = threading.Timer(1.0, s3.put_adapter, ("mixed/legal",), {"weights": new})
    timer.start()
    store = open_store(line, tmp_path, "mixed")
    try:
        data = weights_of(find(store, "legal"))
    except ClientError as error:
        assert "replaced while" in str(error)
        assert error.code == UNAVAILABLE
        timer.join()
        data = weights_of(find(store, "legal"))
    timer.join()
    assert data in (old, new)


def test_what_is_too_large_or_not_whole_is_refused_by_name(
    s3: S3Server, line: Line, tmp_path: Path
) -> None:
    s3.put_adapter("wrong/large", weights=bytes(2 * MIB))
    s3.put("wrong/pickled/adapter_config.json", b"{}")
    s3.put("wrong/pickled/adapter_model.bin", b"pickle")
    store = open_store(line, tmp_path, "wrong", max_bytes=MIB)
    with pytest.raises(ClientError, match="wrong/large has 2,097,1.. bytes, more than the"):
        find(store, "large")
    with pytest.raises(ClientError, match=r"no adapter_model.safetensors; it holds .*\.bin"):
        find(store, "pickled")
    assert find(store, "nobody") is None
    assert DiskCache(tmp_path, MIB).num_bytes == 0
