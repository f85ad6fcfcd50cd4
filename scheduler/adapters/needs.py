"""Where the adapters of one request are, when it is tried."""

from loraplex.memory.accounting.adapter_cache import AdapterCache, CachedAdapter
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.request import Request


class AdapterNeeds:
    """The distinct adapters of a request, by the place of each.

    Attributes:
        resident: content hashes in pages.
        loading: content hashes that are being loaded.
        missing: versions of the others, by content hash.
    """

    __slots__ = ("_cached", "loading", "missing", "resident")

    def __init__(self, request: Request, adapters: AdapterCache) -> None:
        self.resident: list[str] = []
        self.loading: list[str] = []
        self.missing: dict[str, AdapterVersion] = {}
        self._cached: list[CachedAdapter] = []
        if not request.bindings:
            return
        for content_hash, version in request.versions.items():
            adapter = adapters.get(content_hash)
            if adapter is None:
                self.missing[content_hash] = version
            elif adapter.is_loading:
                self.loading.append(content_hash)
            else:
                self.resident.append(content_hash)
                self._cached.append(adapter)

    @property
    def num_missing_pages(self) -> int:
        return sum(version.num_pages for version in self.missing.values())

    @property
    def num_idle_pages(self) -> int:
        """Pages of its resident adapters that count as available and are not for it."""
        return sum(len(adapter.page_ids) for adapter in self._cached if adapter.is_idle)

    def have_slots(self, adapters: AdapterCache) -> bool:
        """Whether all missing adapters could get a slot, and no resident one would lose its own."""
        num_own_idle = sum(adapter.is_idle for adapter in self._cached)
        return adapters.num_free_slots + adapters.num_idle - num_own_idle >= len(self.missing)
