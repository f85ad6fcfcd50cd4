"""Finds adapters in a file system that fsspec opens, and downloads them into the cache."""

import hashlib
import logging
import time
from typing import Any

from loraplex.engine.adapters.paths import ADAPTER_FILE, WEIGHTS_FILE
from loraplex.engine.errors import client_error
from loraplex.engine.stores.adapter_store import UNAVAILABLE, FolderLease, FoundAdapter
from loraplex.engine.stores.checksums import is_intact
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.disk_cache import DiskCache
from loraplex.engine.stores.download import ChangedFilesError, download
from loraplex.engine.stores.locked_folder import LockedFolder
from loraplex.engine.stores.remote_files import RemoteFile, RemoteFiles
from loraplex.engine.stores.store_address import StoreAddress
from loraplex.engine.stores.store_counts import StoreCounts
from loraplex.engine.stores.store_source import store_source

TEXT_FILES = (
    "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json",
)  # fmt: skip
"""Files beside the two of an adapter that its reader looks at."""

MAX_VERIFIED = 10_000

logger = logging.getLogger("loraplex.stores")


class RemoteStore:
    """Takes an adapter NAME from ADDRESS/NAME.

    A folder that is in the cache in the store's version is used without a download. While the store
    does not answer, the version that was used last is.
    """

    def __init__(
        self,
        address: StoreAddress,
        cache: DiskCache,
        *,
        max_bytes: int,
        options: dict[str, Any] | None = None,
        counts: StoreCounts | None = None,
    ) -> None:
        """Makes a store that downloads into the cache.

        Args:
            max_bytes: bounds one adapter.
            options: of fsspec's file system.
            counts: gets the downloads.
        """
        self._address = address
        self._cache = cache
        self._max_bytes = min(max_bytes, cache.max_bytes)
        self._options = options or {}
        self._counts = counts or StoreCounts()
        self._verified: set[str] = set()  # folders whose checksums this process has compared
        self.root = address.root

    def find(self, name: str, tenant: str, deadline: Deadline) -> FoundAdapter | None:
        """Finds as AdapterStore.find does."""
        location = self._address.locate(name, tenant)
        if location is None:
            return None
        key = _short_hash(location)
        owner = tenant if self._address.is_private else ""
        try:
            remote = RemoteFiles(location, self._options)
            files = _chosen(remote.list(ADAPTER_FILE, deadline), location)
        except PermissionError as error:
            raise client_error("adapter", f"{location}: the store refuses it: {error}") from None
        except OSError as error:
            folder = self._cache.open(key)
            if folder is None:
                text = f"{location}: the store does not answer: {error}"
                raise client_error(UNAVAILABLE, text) from None
            logger.warning("%s does not answer, using the copy in the cache: %s", location, error)
        else:
            if not files:
                return None
            self._check_size(location, files)
            folder = self._fetch(key, location, remote, files, deadline)
        return self._found(location, owner, folder)

    def _found(self, location: str, owner: str, folder: LockedFolder) -> FoundAdapter:
        key, version, _ = folder.path.name.split(".")

        def find_again() -> FoundAdapter | None:
            again = self._cache.open(key, version)
            return self._found(location, owner, again) if again is not None else None

        source = store_source(location, str(folder.path), owner)
        return FoundAdapter(source, FolderLease(folder.release), find_again)

    def _check_size(self, location: str, files: list[RemoteFile]) -> None:
        num_bytes = sum(file.num_bytes for file in files)
        if num_bytes > self._max_bytes:
            raise client_error(
                "adapter",
                f"{location} has {num_bytes:,} bytes, more than the {self._max_bytes:,} that "
                "adapter_store_max_bytes and adapter_cache_bytes allow",
            )

    def _fetch(
        self,
        key: str,
        location: str,
        remote: RemoteFiles,
        files: list[RemoteFile],
        deadline: Deadline,
    ) -> LockedFolder:
        version = _short_hash(repr(files))
        num_bytes = sum(file.num_bytes for file in files)
        folder = self._cache.open(key, version)
        if folder is not None and not self._is_intact(folder):
            logger.warning("%s: the copy in the cache is damaged", location)
            self._cache.remove(folder)
            folder = None
        if folder is not None:
            return folder
        try:
            place = self._cache.reserve(key, version, num_bytes, deadline)
        except OSError as error:
            text = f"{location}: no room in the adapter cache: {error}"
            raise client_error(UNAVAILABLE, text) from None
        if isinstance(place, LockedFolder):
            return place
        begin = time.monotonic()
        try:
            download(remote, files, place.path, deadline)
        except BaseException as error:
            place.discard()
            self._counts.count_failed_download()
            logger.warning("downloading %s failed: %s", location, error)
            raise _download_error(location, error) from error
        folder = place.commit()
        self._counts.count_download(time.monotonic() - begin, num_bytes)
        self._note_verified(folder)
        logger.info("downloaded %s, %d bytes", location, num_bytes)
        return folder

    def _is_intact(self, folder: LockedFolder) -> bool:
        if folder.path.name not in self._verified:
            if not is_intact(folder.path):
                return False
            self._note_verified(folder)
        return True

    def _note_verified(self, folder: LockedFolder) -> None:
        if len(self._verified) >= MAX_VERIFIED:
            self._verified.clear()
        self._verified.add(folder.path.name)


def _chosen(files: list[RemoteFile], location: str) -> list[RemoteFile]:
    """Returns the files to download in a fixed order, the configuration first; none of none."""
    by_name = {file.name: file for file in files if file.name}
    if by_name and WEIGHTS_FILE not in by_name:
        others = ", ".join(sorted(by_name)[:5])
        raise client_error("adapter", f"{location} holds no {WEIGHTS_FILE}; it holds {others}")
    names = (ADAPTER_FILE, WEIGHTS_FILE, *TEXT_FILES)
    return [by_name[name] for name in names if name in by_name]


def _download_error(location: str, error: BaseException) -> BaseException:
    if isinstance(error, ChangedFilesError | FileNotFoundError):
        return client_error(UNAVAILABLE, f"{location}: {error}: try again")
    if isinstance(error, OSError):
        return client_error(UNAVAILABLE, f"{location}: the download failed: {error}")
    return error


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
