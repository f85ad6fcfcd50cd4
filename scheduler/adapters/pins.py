"""Pins: adapters that the user wants in pages whether they are used or not."""

from collections.abc import Callable, Collection, Hashable, Mapping

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.request import Request
from loraplex.scheduler.request_checks import Pinned, service_problem

MAX_SHARE = 0.5
"""Share of the pages, and of the adapter slots, that pinned adapters may take."""


class AdapterPins:
    """Pinned versions by content hash.

    A pin reserves its adapter once that is resident. Until then the adapter is missing. A missing
    adapter is loaded when there is room, at the latest for its first request.

    A pin is refused if it could leave an unfinished request without room. Pinned pages count
    against every later request, so pins cannot starve a request that was accepted.
    """

    def __init__(
        self,
        *,
        memory: PageManager,
        max_slots: int,
        requests: Mapping[Hashable, Request],
        load: Callable[[AdapterVersion, float], None],
    ) -> None:
        """`requests` are the unfinished ones; `load` begins a load, for which there is room."""
        self._memory = memory
        self._max_pages = int(memory.blocks.num_usable * MAX_SHARE)
        self._max_slots = int(max_slots * MAX_SHARE)
        self._requests = requests
        self._load = load
        self._pinned: dict[str, dict[AdapterVersion, None]] = {}  # content hash -> pinned versions
        self._missing: dict[str, None] = {}  # content hashes, to be loaded in this order
        self.num_pages = 0  # of all pinned adapters, be they resident or missing

    def __len__(self) -> int:
        return len(self._pinned)

    def reserved(self) -> list[str]:
        """Return the content hashes that pins reserve in the adapter cache."""
        return [content_hash for content_hash in self._pinned if content_hash not in self._missing]

    def is_reserved(self, content_hash: str) -> bool:
        """Whether a pin reserves the adapter in the adapter cache."""
        return content_hash in self._pinned and content_hash not in self._missing

    def besides(self, content_hashes: Collection[str]) -> Pinned:
        """Count what is pinned and cannot be used by a request of these adapters."""
        own = [next(iter(self._pinned[h])) for h in content_hashes if h in self._pinned]
        num_pages = self.num_pages - sum(version.num_pages for version in own)
        return Pinned(num_pages, len(self._pinned) - len(own))

    def pin(self, version: AdapterVersion) -> str:
        """Pin a READY version; returns the reason if it cannot be pinned."""
        if version.content_hash not in self._pinned:
            if refusal := self._refusal(version):
                return f"adapter {version.name!r} cannot be pinned: {refusal}"
            self._pinned[version.content_hash] = {}
            self._missing[version.content_hash] = None
            self.num_pages += version.num_pages
        self._pinned[version.content_hash][version] = None
        version.is_pinned = True
        return ""

    def unpin(self, version: AdapterVersion, now: float) -> None:
        """End a pin, if there is one. An adapter without other users is idle then."""
        if not version.is_pinned:
            return
        version.is_pinned = False
        content_hash = version.content_hash
        versions = self._pinned[content_hash]
        del versions[version]
        if versions:
            return
        if self.is_reserved(content_hash):
            self._memory.adapters.unreserve(content_hash, now)
        self._missing.pop(content_hash, None)
        del self._pinned[content_hash]
        self.num_pages -= version.num_pages

    def keep(self, now: float) -> None:
        """Reserve what has become resident, and load what is missing while there is room."""
        for content_hash in list(self._missing):
            adapter = self._memory.adapters.get(content_hash)
            if adapter is None:
                version = next(iter(self._pinned[content_hash]))
                has_room = self._memory.num_available >= version.num_pages
                if has_room and self._memory.has_adapter_slot:
                    self._load(version, now)
            elif not adapter.is_loading:
                self._memory.adapters.reserve(content_hash)
                del self._missing[content_hash]

    def _refusal(self, version: AdapterVersion) -> str:
        num_pages = self.num_pages + version.num_pages
        if num_pages > self._max_pages:
            return (
                f"it needs {version.num_pages} pages, and {self.num_pages} of the "
                f"{self._max_pages} pages for pinned adapters are taken; unpin others or enlarge "
                "the pool"
            )
        if len(self._pinned) >= self._max_slots:
            return (
                f"pinned adapters may take {self._max_slots} of the adapter slots and have them; "
                "unpin others or raise max_adapter_slots"
            )
        for request in self._requests.values():
            besides = self.besides(request.versions)
            if version.content_hash not in request.versions:
                besides = Pinned(besides.num_pages + version.num_pages, besides.num_slots + 1)
            if service_problem(request, self._memory, besides):
                return (
                    "an unfinished request needs so much of the pool that it would find no room; "
                    "pin it when that one has ended"
                )
        return ""

    def check_integrity(self) -> None:
        """Raise IntegrityError unless counts are exact and reserved adapters are resident."""
        num_pages = sum(next(iter(versions)).num_pages for versions in self._pinned.values())
        if num_pages != self.num_pages or not 0 <= num_pages <= self._max_pages:
            raise IntegrityError(f"{num_pages} pages are pinned, counted as {self.num_pages}")
        for content_hash, versions in self._pinned.items():
            if not all(v.is_pinned and v.content_hash == content_hash for v in versions):
                raise IntegrityError(f"a version is pinned as {content_hash} and is not")
            adapter = self._memory.adapters.get(content_hash)
            is_resident = adapter is not None and not adapter.is_loading
            if self.is_reserved(content_hash) and not is_resident:
                raise IntegrityError(f"adapter {content_hash} is reserved and not resident")
