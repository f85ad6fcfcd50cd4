"""The contract of a store of adapters, and what it finds."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from loraplex.engine.stores.deadline import Deadline
from loraplex.scheduler.frontend_protocol import AdapterSource

UNAVAILABLE = "store_unavailable"
"""Code of errors after which the same request may succeed."""


class FolderLease:
    """Keeps the files of a downloaded adapter in the cache until the last holder lets go."""

    def __init__(self, release: Callable[[], None]) -> None:
        """Makes a lease with one holder. `release` is called once, in the last holder's thread."""
        self._release = release
        self._num_holders = 1
        self._lock = threading.Lock()

    def share(self) -> bool:
        """Adds a holder; returns False if the last one has let go."""
        with self._lock:
            self._num_holders += self._num_holders > 0
            return self._num_holders > 0

    def release(self) -> None:
        """Removes a holder."""
        with self._lock:
            self._num_holders -= 1
            is_last = not self._num_holders
        if is_last:
            self._release()


class FolderLeases(list[FolderLease]):
    """The leases of one request."""

    def release(self) -> None:
        """Lets go of all of them."""
        while self:
            self.pop().release()


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """A folder with an adapter's files.

    Attributes:
        lease: keeps the files there; None if they are not in the cache.
        find_again: returns the same files with a new lease, without asking the store; None if they
            have left the cache.
    """

    source: AdapterSource
    lease: FolderLease | None = None
    find_again: "Callable[[], FoundAdapter | None] | None" = None

    def reopen(self) -> "FoundAdapter | None":
        """Returns the files with a lease, None if they are not there any more."""
        return self.find_again() if self.find_again is not None else None


class AdapterStore(Protocol):
    """Finds adapters by name. Its methods are called in threads and may block."""

    root: str

    def find(self, name: str, tenant: str, deadline: Deadline) -> FoundAdapter | None:
        """Returns the adapter of this name, None if there is none for the tenant.

        Raises:
            ClientError: the adapter cannot be used, or the store cannot be asked.
        """
        ...
