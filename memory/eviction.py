"""Which idle tenants give up their pages when room is needed. Pure functions.

One least-recently-used order runs over idle adapters and idle prefix blocks. Another policy is
another function with this signature; the caches only offer candidates and carry out the choice.
"""

from collections.abc import Iterable
from heapq import merge
from typing import NamedTuple

from loraplex.memory.block_manager import Owner


class Candidate(NamedTuple):
    """Something idle that may be evicted as a whole."""

    last_use: float  # seconds, by the scheduler's clock
    owner: Owner  # ADAPTER or PREFIX
    key: str | int  # an adapter's content hash, or a prefix block's page id
    num_pages: int


def _last_use(candidate: Candidate) -> float:
    return candidate.last_use


def choose_victims(
    num_pages: int, adapters: Iterable[Candidate], prefix_blocks: Iterable[Candidate]
) -> list[Candidate]:
    """The least recently used candidates that together free at least `num_pages`.

    Both inputs come oldest first and are read no further than needed, so the cost is that of the
    victims, not of the cache. If all of them together free too little, all are returned.
    """
    victims: list[Candidate] = []
    num_freed = 0
    for candidate in merge(adapters, prefix_blocks, key=_last_use):
        if num_freed >= num_pages:
            break
        victims.append(candidate)
        num_freed += candidate.num_pages
    return victims
