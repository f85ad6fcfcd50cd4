"""The load of one engine, as placement sees it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """State of one engine: its last report, and the requests that were sent to it since.

    Attributes:
        max_running: requests that run at one time.
        waiting_tokens: prompt tokens that are not computed yet.
        free_pages: pages that are free, or would be after evicting everything idle.
        prefill_tokens_per_second: speed of prompts; 0 is not known.
        load_seconds: content hash of each adapter that the engine holds or loads -> seconds until
            it can be used: 0 on the device. An absent adapter takes `cold_load_seconds`.
        unhashed: names of adapters whose requests went there before their content was known.
    """

    engine_id: str
    running: int
    waiting: int
    max_running: int
    waiting_tokens: int
    free_pages: int
    num_pages: int
    prefill_tokens_per_second: float
    steps_per_second: float
    age_seconds: float
    cold_load_seconds: float
    load_seconds: Mapping[str, float] = field(default_factory=dict)
    unhashed: Collection[str] = ()
    draining: bool = False

    @property
    def occupancy(self) -> int:
        """Unfinished requests."""
        return self.running + self.waiting

    @property
    def fill(self) -> float:
        """Share of the seats or of the pages in use, the greater one; 1 is full."""
        pages = 1 - self.free_pages / self.num_pages
        return min(1.0, max(self.occupancy / self.max_running, pages))

    def is_suspect(self, max_age_seconds: float) -> bool:
        """Returns whether the report is older than `max_age_seconds`."""
        return self.age_seconds > max_age_seconds

    def is_full(self, pages: int) -> bool:
        """Returns whether a request of `pages` pages cannot start now.

        One page is kept for each unfinished request, as the scheduler's admission keeps it. An
        engine without requests is never full: it starts any request, or refuses it for good.
        """
        if not self.occupancy:
            return False
        return self.occupancy >= self.max_running or self.free_pages < pages + self.occupancy

    def holds(self, content_hash: str, name: str) -> bool:
        """Returns whether the engine holds or loads an adapter, as far as is known."""
        return content_hash in self.load_seconds or name in self.unhashed

    def seconds_to_load(self, content_hash: str) -> float:
        """Returns seconds until an adapter can be used; "" is the base model."""
        if not content_hash:
            return 0.0
        return self.load_seconds.get(content_hash, self.cold_load_seconds)
