"""Adapters from a hub that speaks Hugging Face's API on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engine.stores.adapter_store import FoundAdapter
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.disk_cache import DiskCache
from loraplex.engine.stores.remote_store import RemoteStore
from loraplex.engine.stores.store_address import StoreAddress

from helpers.stores.fake_hub import FakeHub, fake_hub

pytestmark = pytest.mark.e2e


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


def open_store(hub: FakeHub, cache: Path, uri: str) -> RemoteStore:
    return RemoteStore(
        StoreAddress.parse(uri),
        DiskCache(cache, 64 << 20),
        max_bytes=32 << 20,
        options={"endpoint": hub.url, "token": False},
    )


def files_of(answer: FoundAdapter | None) -> dict[str, bytes]:
    assert answer is not None
    folder = Path(answer.source.path)
    files = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
    assert answer.lease is not None
    answer.lease.release()
    return files


@pytest.mark.parametrize("uri", ["hf://acme", "hf://"])
def test_a_repository_is_downloaded_once_and_again_when_it_changes(
    hub: FakeHub, tmp_path: Path, uri: str
) -> None:
    name = "legal" if uri.endswith("acme") else "acme/legal"
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(5 << 20)}
    store = open_store(hub, tmp_path, uri)
    assert store.find(name, "", Deadline(60)) is None
    hub.repos["acme/legal"] = {**files, "README.md": b"not needed", "optimizer.pt": b"no"}
    assert files_of(store.find(name, "", Deadline(60))) == files
    num_files = hub.num_files_served
    assert files_of(store.find(name, "", Deadline(60))) == files
    assert hub.num_files_served == num_files
    hub.repos["acme/legal"]["adapter_config.json"] = b"[]"
    changed = {**files, "adapter_config.json": b"[]"}
    assert files_of(store.find(name, "", Deadline(60))) == changed
    del hub.repos["acme/legal"]
    assert store.find(name, "", Deadline(60)) is None
