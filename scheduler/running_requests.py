"""The running requests, ordered by rank, each with a slot of the workers' state."""

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.request import Request, RequestState

_rank = attrgetter("rank")


class RunningRequests:
    """Gives `max_num_seqs` slots to requests. The last one by rank is the first to be preempted."""

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._requests: list[Request] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._freed_slots: list[int] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Iterates in order of rank; the newest may be released meanwhile."""
        return iter(self._requests)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def newest(self) -> Request:
        return self._requests[-1]

    def add(self, request: Request) -> None:
        """Give the request a slot; one must be free."""
        request.slot = self._free_slots.pop()
        request.state = RequestState.RUNNING
        insort(self._requests, request, key=_rank)

    def release(self, request: Request) -> None:
        """Take the slot back. The next plan names it as freed, and may already reuse it."""
        if self._requests[-1] is request:
            self._requests.pop()
        else:
            self._requests.remove(request)
        self._free_slots.append(request.slot)
        self._freed_slots.append(request.slot)
        request.slot = -1
        request.page_epoch += 1

    def take_freed_slots(self) -> list[int]:
        """Returns the slots freed since the last call."""
        freed, self._freed_slots = self._freed_slots, []
        return freed

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every slot is free or has one request, all in order."""
        slots = self._free_slots + [request.slot for request in self._requests]
        if sorted(slots) != list(range(self.max_num_seqs)):
            raise IntegrityError("a slot is lost or used twice")
        if sorted(self._requests, key=_rank) != self._requests:
            raise IntegrityError("the running requests are out of order")
