"""Adapters that the user wants in pages whether they are used or not."""

from collections.abc import Callable, Hashable, Mapping

from loraplex.memory.accounting.adapter_cache import Residency
from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.request import Request
from loraplex.scheduler.request_checks import capacity_problem

MAX_SHARE = 0.5
"""Of the pages, and of the adapter slots, that pinned adapters may take."""


class AdapterPins:
    """Pinned versions by content. A content is held in the adapter cache once it is resident; until
    then it is missing, and loaded when there is room: at the latest for its first request.

    A pin is refused if it could leave an unfinished request without room; what is pinned counts
    against every later request, so none that was accepted can be starved by pins.
    """

    def __init__(
        self,
        *,
        memory: PageManager,
        max_slots: int,
        requests: Mapping[Hashable, Request],
        load: Callable[[AdapterVersion, float], None],
    ) -> None:
        """`requests` are the unfinished ones; `load` begins to load an adapter into free pages."""
        self._memory = memory
        self._max_pages = int(memory.blocks.num_usable * MAX_SHARE)
        self._max_slots = int(max_slots * MAX_SHARE)
        self._requests = requests
        self._load = load
        self._records: dict[str, dict[AdapterVersion, None]] = {}  # content hash -> pinned versions
        self._missing: dict[str, None] = {}  # content hashes, to be loaded in this order
        self.num_pages = 0  # of all pinned contents, whether resident or not

    def __len__(self) -> int:
        return len(self._records)

    def held(self) -> list[str]:
        """Content hashes that have a pin in the adapter cache."""
        return [content_hash for content_hash in self._records if content_hash not in self._missing]

    def is_held(self, content_hash: str) -> bool:
        return content_hash in self._records and content_hash not in self._missing

    def num_pages_besides(self, content_hash: str) -> int:
        """Pages that a request of this content (empty: the base model) cannot have."""
        own = self._records.get(content_hash)
        return self.num_pages - (next(iter(own)).num_pages if own else 0)

    def pin(self, version: AdapterVersion) -> str:
        """Pin a READY version; returns why it cannot be, if so."""
        if version.content_hash not in self._records:
            if refusal := self._refusal(version):
                return f"adapter {version.name!r} cannot be pinned: {refusal}"
            self._records[version.content_hash] = {}
            self._missing[version.content_hash] = None
            self.num_pages += version.num_pages
        self._records[version.content_hash][version] = None
        version.is_pinned = True
        return ""

    def unpin(self, version: AdapterVersion, now: float) -> None:
        """Idempotent. An adapter without other users is idle then."""
        if not version.is_pinned:
            return
        version.is_pinned = False
        content_hash = version.content_hash
        versions = self._records[content_hash]
        del versions[version]
        if versions:
            return
        if self.is_held(content_hash):
            self._memory.adapters.unpin(content_hash, now)
        self._missing.pop(content_hash, None)
        del self._records[content_hash]
        self.num_pages -= version.num_pages

    def keep(self, now: float) -> None:
        """Hold what has become resident, and load what is missing while there is room."""
        for content_hash in list(self._missing):
            adapter = self._memory.adapters.get(content_hash)
            if adapter is None:
                version = next(iter(self._records[content_hash]))
                has_room = self._memory.num_available >= version.num_pages
                if has_room and self._memory.has_adapter_slot:
                    self._load(version, now)
            elif adapter.residency is Residency.RESIDENT:
                self._memory.adapters.pin(content_hash)
                del self._missing[content_hash]

    def _refusal(self, version: AdapterVersion) -> str:
        num_pages = self.num_pages + version.num_pages
        if num_pages > self._max_pages:
            return (
                f"it needs {version.num_pages} pages, and of the {self._max_pages} that pinned "
                f"adapters may take {self.num_pages} are taken; unpin others or enlarge the pool"
            )
        if len(self._records) >= self._max_slots:
            return (
                f"pinned adapters may take {self._max_slots} of the adapter slots and have them; "
                "unpin others or raise max_adapter_slots"
            )
        for request in self._requests.values():
            own = request.adapter_version.content_hash if request.adapter_version else ""
            if own == version.content_hash:
                besides = self.num_pages
            else:
                besides = self.num_pages_besides(own) + version.num_pages
            if capacity_problem(request, request.adapter_version, self._memory, besides):
                return (
                    "an unfinished request needs so much of the pool that it would find no room; "
                    "pin it when that one has ended"
                )
        return ""

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the counts are right and what is held is resident."""
        num_pages = sum(next(iter(versions)).num_pages for versions in self._records.values())
        if num_pages != self.num_pages or not 0 <= num_pages <= self._max_pages:
            raise IntegrityError(f"{num_pages} pages are pinned, counted as {self.num_pages}")
        for content_hash, versions in self._records.items():
            if not all(r.is_pinned and r.content_hash == content_hash for r in versions):
                raise IntegrityError(f"a version is pinned as {content_hash} and is not")
            adapter = self._memory.adapters.get(content_hash)
            is_resident = adapter is not None and adapter.residency is Residency.RESIDENT
            if self.is_held(content_hash) and not is_resident:
                raise IntegrityError(f"adapter {content_hash} is held and not resident")
