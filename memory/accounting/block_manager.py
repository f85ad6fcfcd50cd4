"""The allocator of pages: the owner and the reference count of each page id.

Page ids are ``1 .. num_pages - 1``. Page 0 is the null page: padding writes into it, and it has no
owner. The block manager holds integers only; the bytes lie in the worker's pool.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum


class Owner(IntEnum):
    """Use of a page."""

    FREE = 0
    KV = 1  # in the page table of a running request, or of several
    PREFIX = 2  # an idle prefix block, which may be evicted
    ADAPTER = 3  # of an adapter that is loading or resident


# Plain integers, as enum members are slow in code that runs once a page.
_FREE, _KV, _PREFIX = int(Owner.FREE), int(Owner.KV), int(Owner.PREFIX)


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free. The caller must evict or wait first."""


class IntegrityError(RuntimeError):
    """The accounting is wrong: a page is lost, shared by mistake, leaked or released twice."""


class BlockManager:
    """Free list, owner and reference count of every page. Each operation takes O(1) a page.

    A KV page has one reference for each request whose page table lists it. An adapter's page has
    exactly one. Free pages and idle prefix blocks have none.

    Attributes:
        num_planned: steps planned so far; the scheduler sets it. The last of these steps may use a
            page that is released now.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool needs at least 2 pages (page 0 is reserved), got {num_pages}")
        self.num_pages = num_pages
        self._free = deque(range(1, num_pages))  # the page freed first is handed out first
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
        """Number of pages that tenants can own: all but the null page."""
        return self.num_pages - 1

    def num_owned(self, owner: Owner) -> int:
        return self._num_owned[owner]

    def owner(self, page_id: int) -> Owner:
        return Owner(self._owners[page_id])

    def owners_of_every(self, step: int) -> bytes:
        """Return the owners of the pages 1, 1 + step, 1 + 2 * step and so on, one byte each."""
        return bytes(self._owners[1::step])

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
        """Return the number of steps planned when the last user of any of these pages ended."""
        return max(map(self._num_planned_at_release.__getitem__, page_ids), default=0)

    def share(self, page_id: int) -> None:
        """Add a reference to a KV page or to an idle prefix block, which becomes a KV page."""
        owner = self._owners[page_id]
        if owner == _PREFIX:
            self._owners[page_id] = _KV
            self._move(_PREFIX, _KV, 1)
        elif owner != _KV:
            raise IntegrityError(f"page {page_id} of {Owner(owner).name} cannot be shared")
        self._ref_counts[page_id] += 1

    def release(self, page_id: int, *, keep: bool = False, num_planned: int | None = None) -> bool:
        """Drop one reference; returns whether it was the last.

        After the last one the page is free or, with `keep`, an idle prefix block.

        Args:
            num_planned: steps planned when its last user ended; default: those planned by now.
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
            self._set_owner(page_id, owner, _PREFIX)
        else:
            self._set_owner(page_id, owner, _FREE)
        return True

    def discard(self, page_id: int) -> None:
        """Free an idle prefix block."""
        if self._owners[page_id] != _PREFIX:
            raise IntegrityError(f"page {page_id} is no idle prefix block")
        self._set_owner(page_id, _PREFIX, _FREE)

    def _set_owner(self, page_id: int, old: int, new: int) -> None:
        self._owners[page_id] = new
        if new == _FREE:
            self._free.append(page_id)
        self._move(old, new, 1)

    def _move(self, old: int, new: int, num_pages: int) -> None:
        self._num_owned[old] -= num_pages
        self._num_owned[new] += num_pages

    def check_integrity(self, claims: Iterable[tuple[int, Owner, int]]) -> None:
        """Compare the accounts with the tenants' claims: (page id, owner, references).

        Raises:
            IntegrityError: a page is neither free nor claimed, or both, is claimed twice, or has
                another owner or count than claimed.
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
