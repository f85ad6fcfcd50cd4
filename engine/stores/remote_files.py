"""Lists and reads the files of a store through fsspec, within a deadline."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from loraplex.engine.stores.deadline import Deadline, StoreTimeoutError

POLL_S = 0.25
CALL_S = 30.0  # after which a call that brought nothing is tried again
ATTEMPTS = 4  # without progress
FIRST_PAUSE_S = 0.2  # doubled after each attempt
VERSION_KEYS = (
    "ETag", "etag", "VersionId", "blob_id", "md5", "content_md5", "sha256", "generation",
    "LastModified", "last_modified", "mtime", "created",
)  # fmt: skip

Result = TypeVar("Result")
logger = logging.getLogger("loraplex.stores")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file; `version` is another text once the store holds other bytes under this path."""

    name: str
    path: str
    num_bytes: int
    version: str


class RemoteFiles:
    """One address of any file system that fsspec knows.

    The calls of asynchronous file systems (S3 among them) are cancelled at the deadline. Those of
    others end when they end; their time is checked between two calls.
    """

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        """Raises ImportError if the package for the address is not installed."""
        self._fs, self._path = url_to_fs(uri, **options)

    def list(self, needed: str, deadline: Deadline) -> list[RemoteFile]:
        """Returns the files of the folder, none if the file `needed` is not among them.

        That file is asked for first. Listing a folder that does not exist makes s3fs list the
        folder above it, which may hold any number of adapters.
        """

        def call() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()  # huggingface_hub's remembers that a repository is missing
            self._call("info", deadline, f"{self._path}/{needed}", refresh=True)
            entries: list[dict[str, Any]] = self._call(
                "ls", deadline, self._path, detail=True, refresh=True
            )
            return entries

        try:
            found = with_retries(call, deadline)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [_file_of(entry) for entry in found if entry.get("type") == "file"]

    def read(self, file: RemoteFile, start: int, end: int, deadline: Deadline) -> bytes:
        """Returns the bytes from `start` to before `end`; raises OSError if they are not all."""
        data: bytes = self._call("cat_file", deadline, file.path, start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"{file.name}: {len(data)} of {end - start} bytes came")
        return data

    def _call(self, method: str, deadline: Deadline, *args: Any, **options: Any) -> Any:
        deadline.check()
        if not isinstance(self._fs, AsyncFileSystem):
            return getattr(self._fs, method)(*args, **options)
        coroutine = getattr(self._fs, "_" + method)(*args, **options)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop)
        call = Deadline(CALL_S)
        try:
            while call.left_s:
                try:
                    return future.result(min(POLL_S, call.left_s))
                except FutureTimeoutError:
                    if future.done():
                        raise
                    deadline.check()
                except CancelledError:
                    break
            raise TimeoutError(f"nothing came for {CALL_S:g} s")
        finally:
            future.cancel()


def with_retries(action: Callable[[], Result], deadline: Deadline) -> Result:
    """Returns what `action` returns, after pauses between failures that may pass.

    Raises:
        OSError: the last failure; what is missing or refused is not tried again.
    """
    pause_s = FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError, PermissionError, StoreTimeoutError):
            raise
        except Exception as error:  # each file system raises classes of its own
            _raise_lasting(error)
            if attempt == ATTEMPTS:
                raise OSError(f"{type(error).__name__}: {error}") from error
            logger.info("a store failed, attempt %d of %d: %s", attempt, ATTEMPTS, error)
            deadline.sleep(pause_s)
            pause_s *= 2
    raise AssertionError("unreachable")


def _raise_lasting(error: Exception) -> None:
    """Raises FileNotFoundError or PermissionError if an HTTP status says so."""
    response = getattr(error, "response", error)
    status = getattr(response, "status_code", getattr(response, "status", None))
    if status in (404, 410):
        raise FileNotFoundError(str(error)) from error
    if status in (401, 403):
        raise PermissionError(str(error)) from error


def _file_of(entry: dict[str, Any]) -> RemoteFile:
    path = str(entry["name"])
    parts = {key: str(entry[key]) for key in VERSION_KEYS if entry.get(key) is not None}
    lfs = entry.get("lfs")
    if lfs:
        parts["lfs"] = str(lfs.get("sha256") if isinstance(lfs, dict) else lfs)
    return RemoteFile(path.rsplit("/", 1)[-1], path, int(entry["size"] or 0), repr(parts))
