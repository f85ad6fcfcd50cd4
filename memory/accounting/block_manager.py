"""The one allocator of pages: who owns each page id and how many tenants hold it.

Page ids are ``1 .. num_pages - 1``; page 0 is the null page that padding writes into and
nobody owns. Integers only: the page's bytes live in the worker's pool.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum


class Owner(IntEnum):
    """What a page is used for."""

    FREE = 0
    KV = 1  # in the page table of at least one running request
    PREFIX = 2  # a cached prefix block that no running request uses; may be evicted
    ADAPTER = 3  # weights of an adapter that is loading or resident


# Plain integers for the paths taken once a page.
_FREE, _KV, _PREFIX = int(Owner.FREE), int(Owner.KV), int(Owner.PREFIX)


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free; the caller must evict or wait first."""


class IntegrityError(RuntimeError):
    """The books do not balance: a page is lost, shared by mistake, leaked or released twice."""


class BlockManager:
    """Free list, owner and reference count of every page; each operation is O(1) per page.

    A page with references is pinned. A KV page holds one reference for each request whose page
    table lists it, an adapter's page exactly one; free pages and idle prefix blocks hold none.

    Attributes:
        num_planned: steps planned so far, kept by the scheduler: a page that is released now may
            be in use by the last of them.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool needs at least 2 pages (page 0 is reserved), got {num_pages}")
        self.num_pages = num_pages
        self._free = deque(range(1, num_pages))  # handed out first: what was freed first
        self._owners = bytearray(num_pages)
        self._ref_counts = array("i", bytes(4 * num_pages))
        self._num_owned = [num_pages - 1, 0, 0, 0]
        self.num_planned = 0
        self._num_planned_at_release = array("q", bytes(8 * num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that tenants can own: all but the null page."""
        return self.num_pages - 1

    def num_owned(self, owner: Owner) -> int:
        return self._num_owned[owner]

    def owner(self, page_id: int) -> Owner:
        return Owner(self._owners[page_id])

    def allocate(self, owner: Owner, num_pages: int) -> list[int]:
        """Take free pages for `owner`, each with one reference.

        Raises:
            OutOfPagesError: fewer are free; nothing is taken.
        """
        if owner not in (Owner.KV, Owner.ADAPTER):
            raise ValueError(f"pages are allocated to KV or ADAPTER, not {owner.name}")
        free = self._free
        if num_pages > len(free):
            raise OutOfPagesError(f"{num_pages} pages asked for, {len(free)} free")
        page_ids = [free.popleft() for _ in range(num_pages)]
        for page_id in page_ids:
            self._owners[page_id] = owner
            self._ref_counts[page_id] = 1
        self._move(_FREE, owner, num_pages)
        return page_ids

    def num_planned_at_release(self, page_ids: Sequence[int]) -> int:
        """How many steps were planned when the last user of any of these pages ended."""
        return max(map(self._num_planned_at_release.__getitem__, page_ids), default=0)

    def share(self, page_id: int) -> None:
        """Add a reference to a KV page; an idle prefix block is a KV page again."""
        owner = self._owners[page_id]
        if owner == _PREFIX:
            self._owners[page_id] = _KV
            self._move(_PREFIX, _KV, 1)
        elif owner != _KV:
            raise IntegrityError(f"page {page_id} of {Owner(owner).name} cannot be shared")
        self._ref_counts[page_id] += 1

    def release(self, page_id: int, *, keep: bool = False, num_planned: int | None = None) -> bool:
        """Drop one reference; True if it was the last.

        The page is free then or, with `keep`, an idle prefix block.

        Args:
            num_planned: how many steps were planned when its last user ended, if that was before.
        """
        count = self._ref_counts[page_id] - 1
        if count < 0:
            raise IntegrityError(f"page {page_id} released without a reference")
        self._ref_counts[page_id] = count
        if count:
            return False
        planned = self.num_planned if num_planned is None else num_planned
        self._num_planned_at_release[page_id] = planned
        owner = self._owners[page_id]
        if keep:
            if owner != _KV:
                raise IntegrityError(
                    f"page {page_id} of {Owner(owner).name} cannot be a prefix block"
                )
            self._retire(page_id, owner, _PREFIX)
        else:
            self._retire(page_id, owner, _FREE)
        return True

    def discard(self, page_id: int) -> None:
        """Free an idle prefix block."""
        if self._owners[page_id] != _PREFIX:
            raise IntegrityError(f"page {page_id} is no idle prefix block")
        self._retire(page_id, _PREFIX, _FREE)

    def _retire(self, page_id: int, old: int, new: int) -> None:
        self._owners[page_id] = new
        if new == _FREE:
            self._free.append(page_id)
        self._move(old, new, 1)

    def _move(self, old: int, new: int, num_pages: int) -> None:
        self._num_owned[old] -= num_pages
        self._num_owned[new] += num_pages

    def check_integrity(self, claims: Iterable[tuple[int, Owner, int]]) -> None:
        """Compare the books with what the tenants claim: (page id, owner, references).

        Raises:
            IntegrityError: a page is neither free nor claimed, or both, claimed twice, or held
                otherwise than claimed.
        """
        expected: dict[int, tuple[Owner, int]] = {}
        for page_id, owner, num_refs in claims:
            if not 0 < page_id < self.num_pages:
                raise IntegrityError(f"page {page_id} claimed by {owner.name} does not exist")
            if page_id in expected:
                raise IntegrityError(f"page {page_id} has two tenants")
            expected[page_id] = (owner, num_refs)
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError("a page is twice in the free list")
        if 0 in free or self._owners[0] != Owner.FREE or self._ref_counts[0]:
            raise IntegrityError("the null page is in use")
        counts = [0, 0, 0, 0]
        for page_id in range(1, self.num_pages):
            held = (Owner(self._owners[page_id]), self._ref_counts[page_id])
            counts[held[0]] += 1
            if (page_id in free) != (held[0] == Owner.FREE):
                raise IntegrityError(f"page {page_id} of {held[0].name} disagrees with free list")
            claim = expected.get(page_id, (Owner.FREE, 0))
            if held != claim:
                raise IntegrityError(
                    f"page {page_id} is {held[0].name} with {held[1]} references, but its tenants "
                    f"claim {claim[0].name} with {claim[1]}"
                )
        if counts != self._num_owned:
            raise IntegrityError(f"pages by owner are {counts}, counted as {self._num_owned}")
