"""Finds adapters in the local cache of huggingface_hub, without asking the hub."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from loraplex.engine.adapters.paths import ADAPTER_FILE
from loraplex.engine.stores.adapter_store import FoundAdapter
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.store_address import StoreAddress
from loraplex.engine.stores.store_source import store_source

_COMMIT = re.compile(r"[0-9a-f]{7,64}")


def hub_cache_dir() -> Path:
    """Returns the folder of downloads, as huggingface_hub takes it from its settings."""
    try:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)
    except ImportError:
        home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()


class HubCacheStore:
    """Takes ORG/NAME from models--ORG--NAME/snapshots/COMMIT, where refs/main names the commit.

    A name may end in @REVISION. The layout is that of huggingface_hub.
    """

    def __init__(self, address: StoreAddress, cache_dir: Path | None = None) -> None:
        """`cache_dir` replaces huggingface_hub's."""
        self._address = address
        self._cache_dir = cache_dir or hub_cache_dir()
        self.root = f"{address.root} in {self._cache_dir}"

    def find(self, name: str, tenant: str, deadline: Deadline) -> FoundAdapter | None:
        """Finds as AdapterStore.find does. A snapshot without adapter_config.json is no adapter."""
        location = self._address.locate(name, tenant)
        if location is None:
            return None
        repo, _, revision = location.removeprefix("hf://").partition("@")
        folder = self._cache_dir / f"models--{repo.replace('/', '--')}"
        for snapshot in _snapshots(folder, revision or "main"):
            if (snapshot / ADAPTER_FILE).is_file():
                owner = tenant if self._address.is_private else ""
                return FoundAdapter(store_source(location, str(snapshot.resolve()), owner))
        return None


def _snapshots(folder: Path, revision: str) -> Iterator[Path]:
    """Yields the folder of a revision: the commit that a ref names, or a commit itself."""
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    if _COMMIT.fullmatch(commit):
        yield folder / "snapshots" / commit
