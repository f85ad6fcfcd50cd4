"""Stores on this machine: folders, and the cache of huggingface_hub."""

from pathlib import Path

import pytest

from loraplex.engine.errors import ClientError
from loraplex.engine.stores.adapter_store import FoundAdapter
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.folder_store import FolderStore
from loraplex.engine.stores.hub_cache_store import HubCacheStore
from loraplex.engine.stores.store_address import StoreAddress

from helpers.fakes.fake_engine import make_fake_adapter

SOON = Deadline(60)


def folder_store(root: Path | str) -> FolderStore:
    return FolderStore(StoreAddress.parse(str(root)))


def found(answer: FoundAdapter | None) -> FoundAdapter:
    assert answer is not None
    assert answer.source.is_from_store
    return answer


def test_a_folder_is_read_where_it_lies(tmp_path: Path) -> None:
    folder = make_fake_adapter(tmp_path / "org" / "legal", "1")
    store = folder_store(tmp_path)
    source = found(store.find("org/legal", "", SOON)).source
    assert (source.named, source.path, source.owner) == (str(folder), str(folder), "")
    (folder / "adapter_config.json").write_text("2")
    assert found(store.find("org/legal", "", SOON)).source.stamp != source.stamp
    assert store.find("org", "", SOON) is None  # a folder of adapters
    assert store.find("nobody", "", SOON) is None


def test_links_do_not_leave_the_folder(tmp_path: Path) -> None:
    make_fake_adapter(tmp_path / "ben" / "secret", "ben's")
    make_fake_adapter(tmp_path / "ann" / "own", "ann's")
    (tmp_path / "ann" / "inside").symlink_to("own")
    (tmp_path / "ann" / "outside").symlink_to("../ben/secret")
    store = folder_store(tmp_path / "{tenant}")
    inside = found(store.find("inside", "ann", SOON)).source
    assert inside.path == str(tmp_path / "ann" / "own")
    assert inside.owner == "ann"
    with pytest.raises(ClientError) as error:
        store.find("outside", "ann", SOON)
    assert error.value.code == "forbidden"
    with pytest.raises(ClientError):
        store.find("../ben/secret", "ann", SOON)
    assert store.find("secret", "ann", SOON) is None
    assert store.find("own", "", SOON) is None


def make_snapshot(hub: Path, repo: str, commit: str, ref: str = "") -> Path:
    """Writes an adapter as huggingface_hub does: links to blobs, and a ref."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    blob = folder / "blobs" / f"blob-{commit}"
    blob.write_text(f"{repo} at {commit}")
    (snapshot / "adapter_config.json").symlink_to(f"../../blobs/{blob.name}")
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def test_the_hub_cache_is_read_by_revision(tmp_path: Path) -> None:
    first, second = "1" * 40, "2" * 40
    old = make_snapshot(tmp_path, "acme/legal", first, "v1")
    new = make_snapshot(tmp_path, "acme/legal", second, "main")
    store = HubCacheStore(StoreAddress.parse("hf://acme"), tmp_path)
    for name, snapshot in (("legal", new), ("legal@v1", old), (f"legal@{first}", old)):
        source = found(store.find(name, "", SOON)).source
        assert source.path == str(snapshot)
        assert source.named == f"hf://acme/{name}"
    for name in ("legal@v2", "nobody", f"legal@{'3' * 40}"):
        assert store.find(name, "", SOON) is None
    whole = HubCacheStore(StoreAddress.parse("hf://"), tmp_path)
    assert found(whole.find("acme/legal", "", SOON)).source.path == str(new)


def test_a_ref_does_not_lead_out_of_the_hub_cache(tmp_path: Path) -> None:
    make_fake_adapter(tmp_path / "secret", "")
    make_snapshot(tmp_path, "acme/legal", "1" * 40, "main")
    (tmp_path / "models--acme--legal" / "refs" / "main").write_text("../../secret")
    store = HubCacheStore(StoreAddress.parse("hf://acme"), tmp_path)
    assert store.find("legal", "", SOON) is None
