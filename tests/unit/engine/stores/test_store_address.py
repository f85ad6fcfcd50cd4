"""Addresses of stores: no name and no tenant leads to another one's files."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.engine.adapters.paths import ADAPTER_NAME
from loraplex.engine.config import AdapterConfig, EngineConfig, ServerConfig
from loraplex.engine.errors import ClientError, ConfigError
from loraplex.engine.store_config import StoreConfig
from loraplex.engine.stores.open_stores import check_stores
from loraplex.engine.stores.store_address import StoreAddress, check_apart


@pytest.mark.parametrize(
    ("uri", "root", "scheme"),
    [
        ("s3://bucket/prefix/", "s3://bucket/prefix", "s3"),
        ("hf://", "hf://", "hf"),
        ("/adapters/", "/adapters", "file"),
        ("file:///adapters", "/adapters", "file"),
    ],
)
def test_an_address_has_no_slash_at_its_end(uri: str, root: str, scheme: str) -> None:
    assert StoreAddress.parse(uri) == StoreAddress(root, scheme)


def test_a_tenant_has_a_folder_of_its_own() -> None:
    address = StoreAddress.parse("s3://bucket/{tenant}/lora")
    assert address.locate("legal", "ann") == "s3://bucket/ann/lora/legal"
    assert address.locate("legal", "") is None
    for tenant in ("..", ".", "a/b", "a\\b", "a b", "{tenant}"):
        with pytest.raises(ClientError, match="cannot have a folder") as error:
            address.locate("legal", tenant)
        assert error.value.code == "forbidden"


@given(st.from_regex(ADAPTER_NAME, fullmatch=True))
def test_no_name_leaves_its_folder(name: str) -> None:
    """Segments are resolved as a file system does, by hand."""
    address = StoreAddress.parse("s3://bucket/prefix")
    try:
        location = address.locate(name, "")
    except ClientError:
        return
    assert location is not None
    stack: list[str] = []
    for part in location.removeprefix("s3://").split("/"):
        if part == "..":
            stack.pop()
        elif part not in ("", "."):
            stack.append(part)
    assert stack[:2] == ["bucket", "prefix"]
    assert len(stack) > 2


@pytest.mark.parametrize("name", ["../x", "a/../b", "a/./b", "a//b", "a/", "a\\b"])
def test_dots_and_empty_parts_are_refused(name: str) -> None:
    with pytest.raises(ClientError, match="no part of a name"):
        StoreAddress.parse("s3://bucket").locate(name, "")


@pytest.mark.parametrize("uri", ["s3://bucket/t-{tenant}", "s3://bucket/{tenant}x/y"])
def test_a_tenant_stands_alone_between_slashes(uri: str) -> None:
    with pytest.raises(ConfigError, match="must stand alone"):
        StoreAddress.parse(uri)


@pytest.mark.parametrize(
    ("uris", "is_refused"),
    [
        (("s3://b/{tenant}", "s3://b"), True),
        (("s3://b", "s3://b/teams/{tenant}"), True),
        (("s3://b/{tenant}", "s3://b/teams/{tenant}"), True),
        (("hf://", "hf://{tenant}"), True),
        (("/a", "/a/{tenant}"), True),
        (("s3://b/{tenant}", "s3://b/{tenant}/old"), False),
        (("s3://b/{tenant}", "s3://b/shared"), False),
        (("s3://b/teams/{tenant}", "s3://b/team"), False),
        (("s3://b", "s3://b/more"), False),
    ],
)
def test_no_store_lies_above_the_folders_of_tenants(
    uris: tuple[str, ...], is_refused: bool
) -> None:
    addresses = [StoreAddress.parse(uri) for uri in uris]
    for order in (addresses, addresses[::-1]):
        if is_refused:
            with pytest.raises(ConfigError, match="lies above"):
                check_apart(order)
        else:
            check_apart(order)


def config_of(
    *stores: str, root: str = "", cache: str = "/nowhere", serves: bool = True
) -> EngineConfig:
    return EngineConfig(
        adapter=AdapterConfig(adapter_root=root),
        store=StoreConfig(adapter_stores=stores, adapter_cache_dir=cache),
        server=ServerConfig(endpoint="tcp://127.0.0.1:0" if serves else ""),
    )


def test_a_root_for_clients_does_not_hold_the_folders_of_tenants(tmp_path: Path) -> None:
    stores = (f"{tmp_path}/tenants/{{tenant}}", f"{tmp_path}/shared")
    for folder in ("tenants", "shared", "cache", "root"):
        (tmp_path / folder).mkdir()
    cache = f"{tmp_path}/cache"
    check_stores(config_of(*stores, root=f"{tmp_path}/root", cache=cache))
    check_stores(config_of(*stores, root="/", cache=cache, serves=False))
    for wrong in (
        config_of(*stores, root=str(tmp_path), cache=cache),
        config_of(*stores, root=f"{tmp_path}/root", cache=f"{tmp_path}/root/cache"),
        config_of(*stores, cache=f"{tmp_path}/shared/cache"),
    ):
        with pytest.raises(ConfigError, match="where tenants have files"):
            check_stores(wrong)


@pytest.mark.parametrize(
    ("uri", "text"),
    [("/no/such/folder", "is no directory"), ("nosuch://x", "nosuch"), (" ", "is empty")],
)
def test_a_wrong_address_is_refused_at_the_start(uri: str, text: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=re.escape(text)):
        check_stores(config_of(uri))
