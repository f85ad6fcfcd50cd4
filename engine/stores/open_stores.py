"""Opens the stores that the configuration names."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

from loraplex.engine.adapters.paths import expanded
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.store_config import StoreConfig
from loraplex.engine.stores.adapter_store import AdapterStore
from loraplex.engine.stores.folder_store import FolderStore
from loraplex.engine.stores.hub_cache_store import HubCacheStore
from loraplex.engine.stores.store_address import StoreAddress, check_apart
from loraplex.engine.stores.store_counts import StoreCounts
from loraplex.engine.stores.store_lookup import StoreLookup

INSTALL = "pip install 'loraplex[stores]'"


def check_stores(config: EngineConfig) -> None:
    """Raises ConfigError unless the stores and their cache can be opened."""
    if config.store.adapter_stores:
        open_stores(config.store)
        _check_roots(config)


def adapter_roots(config: EngineConfig) -> tuple[str, ...]:
    """Returns the folders that adapters of clients and of stores must not leave.

    They are real paths, but for a part {tenant} and what follows it.
    """
    addresses = map(StoreAddress.parse, config.store.adapter_stores)
    folders = [address.real_folder for address in addresses if address.scheme == "file"]
    root = expanded(config.adapter.adapter_root)
    return (root, *folders) if root else tuple(folders)


def only_folders(config: StoreConfig) -> StoreConfig:
    """Returns the settings for an engine that looks no names up, but keeps within the folders."""
    uris = config.adapter_stores
    return replace(
        config, adapter_stores=tuple(u for u in uris if StoreAddress.parse(u).scheme == "file")
    )


def make_store_lookup(
    config: StoreConfig, wakeup: Wakeup, counts: StoreCounts
) -> StoreLookup | None:
    """Returns a look-up over the stores, None if there are none; ConfigError as open_stores()."""
    if not config.adapter_stores:
        return None
    return StoreLookup(open_stores(config, counts), config, wakeup, counts=counts)


def open_stores(config: StoreConfig, counts: StoreCounts | None = None) -> list[AdapterStore]:
    """Returns the stores in the order in which they are asked; they add to `counts`.

    Raises:
        ConfigError: an address is wrong, its package is missing, or the cache cannot be made.
    """
    addresses = [StoreAddress.parse(uri) for uri in config.adapter_stores]
    check_apart(addresses)
    counts = counts or StoreCounts()
    return [store for address in addresses for store in _open(address, config, counts)]


def cache_bytes(config: StoreConfig) -> int | None:
    """Returns the bytes in the cache of downloads; None if no store has one, or it is gone."""
    if all(StoreAddress.parse(uri).scheme == "file" for uri in config.adapter_stores):
        return None
    from loraplex.engine.stores.disk_cache import DiskCache

    try:
        folder = Path(config.adapter_cache_dir).expanduser()
        return DiskCache(folder, config.adapter_cache_bytes).num_bytes
    except OSError:
        return None


def _open(address: StoreAddress, config: StoreConfig, counts: StoreCounts) -> list[AdapterStore]:
    if address.scheme == "file":
        folder = _folder_of(address)
        if not os.path.isdir(folder):
            raise ConfigError(f"adapter_store {address.root}: {folder} is no directory")
        return [FolderStore(address)]
    if address.scheme == "hf":
        local = HubCacheStore(address)
        return [local, _remote(address, config, counts)] if _is_hub_wanted() else [local]
    return [_remote(address, config, counts)]


def _is_hub_wanted() -> bool:
    """Tells whether huggingface_hub is installed and not set to be offline."""
    if not (importlib.util.find_spec("huggingface_hub") and importlib.util.find_spec("fsspec")):
        return False
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE


def _remote(address: StoreAddress, config: StoreConfig, counts: StoreCounts) -> AdapterStore:
    try:
        from fsspec import get_filesystem_class

        from loraplex.engine.stores.disk_cache import DiskCache
        from loraplex.engine.stores.remote_store import RemoteStore

        get_filesystem_class(address.scheme)
    except ImportError as error:
        raise ConfigError(f"adapter_store {address.root}: {error}; {INSTALL}") from None
    except ValueError as error:
        raise ConfigError(f"adapter_store {address.root}: {error}") from None
    folder = Path(config.adapter_cache_dir).expanduser()
    try:
        cache = DiskCache(folder, config.adapter_cache_bytes, counts)
    except OSError as error:
        raise ConfigError(f"adapter_cache_dir {folder}: {error}") from None
    return RemoteStore(address, cache, max_bytes=config.adapter_store_max_bytes, counts=counts)


def _check_roots(config: EngineConfig) -> None:
    """Raises ConfigError if clients could read other tenants' files by their paths."""
    addresses = [StoreAddress.parse(uri) for uri in config.store.adapter_stores]
    private = [address for address in addresses if address.is_private]
    if not private:
        return
    hidden = [_folder_of(address) for address in private if address.scheme == "file"]
    hidden.append(expanded(config.store.adapter_cache_dir))
    roots = [_folder_of(a) for a in addresses if a.scheme == "file" and not a.is_private]
    if config.server.endpoint and config.adapter.adapter_root:
        roots.append(expanded(config.adapter.adapter_root))
    for root in roots:
        for path in hidden:
            if os.path.commonpath((path, root)) == root:
                raise ConfigError(
                    f"{root} contains {path}, where tenants have files of their own: any client "
                    "could load them by path; choose another folder"
                )


def _folder_of(address: StoreAddress) -> str:
    return "/" + "/".join(address.fixed_parts)
