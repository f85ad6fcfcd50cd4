"""Looks at the folders that clients name: where they are, and whether their files have changed."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from loraplex.engine.adapters.paths import ADAPTER_FILE, WEIGHTS_FILE, check_under_root, expanded
from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.ipc.channel import Wakeup
from loraplex.scheduler.frontend_protocol import AdapterSource

NUM_THREADS = 4

_STAMPED = (
    ADAPTER_FILE, WEIGHTS_FILE, "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "added_tokens.json",
)  # fmt: skip

Found = Callable[[AdapterSource | ClientError], None]


def find_folder(path: str, root: str) -> AdapterSource:
    """Returns a folder under `root`, with a stamp of its files as they are now.

    The stamp covers device, inode, size, mtime and ctime. Two writes of equal size within one tick
    of the file system's clock (4 ms on ext4) look alike if the stamp was taken between them.

    Raises:
        ClientError: "forbidden" outside the root, "adapter" if the path is no directory.
    """
    real = check_under_root(path, root)
    named = os.path.normpath(os.path.join(expanded(root), path))
    return AdapterSource(named=named, path=real, stamp=stamp_folder(real))


def stamp_folder(folder: str) -> str:
    """Returns a text that changes when the adapter's files are written, replaced or removed."""
    digest = hashlib.blake2b(folder.encode("utf-8", "surrogateescape"), digest_size=16)
    for name in _STAMPED:
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError:
            digest.update(b"missing;")
            continue
        times = (status.st_mtime_ns, status.st_ctime_ns)
        digest.update(repr((status.st_dev, status.st_ino, status.st_size, *times)).encode())
    return digest.hexdigest()


class FolderLookup:
    """Finds folders in threads, as a network file system may not answer.

    Every answer is from after the question. Questions about one path that come before a thread
    turns to it share one answer.
    """

    def __init__(self, root: str, wakeup: Wakeup) -> None:
        """`wakeup` is set when run_ready() has something to do."""
        self._root = root
        self._wakeup = wakeup
        self._lock = threading.Lock()
        self._asked: dict[str, list[Found]] = {}  # by path: questions that no thread has taken
        self._answers: deque[tuple[list[Found], AdapterSource | ClientError]] = deque()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adapter-folder")

    def find(self, path: str, then: Found) -> None:
        """Looks at a folder. run_ready() calls `then` with the result of find_folder()."""
        with self._lock:
            asked = self._asked.get(path)
            if asked is not None:
                asked.append(then)
                return
            self._asked[path] = [then]
        self._threads.submit(self._look, path)

    def _look(self, path: str) -> None:
        with self._lock:
            asked = self._asked.pop(path)
        answer: AdapterSource | ClientError
        try:
            answer = find_folder(path, self._root)
        except ClientError as error:
            answer = error
        except (OSError, ValueError) as error:
            answer = client_error("adapter", f"{path[:200]} cannot be read: {error}")
        self._answers.append((asked, answer))
        self._wakeup.set()

    def run_ready(self) -> None:
        """Hands out the answers that have come."""
        while self._answers:
            asked, answer = self._answers.popleft()
            for then in asked:
                then(answer)

    def close(self) -> None:
        """Drops the questions that no thread has taken."""
        self._threads.shutdown(wait=False, cancel_futures=True)
