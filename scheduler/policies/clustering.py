"""Adapter clustering (S-LoRA, arXiv 2311.03285, section 4.2): run few adapters at a time."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator
from heapq import heappop, heappush

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.policies.policy import ADMITTED, Context, Policy, WaitingView, aged_prefix
from loraplex.scheduler.request import Request

BASE = ""  # the flow of the base model, which costs a step no adapter

Mix = tuple[str, ...]
"""The flow of requests that mix these adapters. The flow of one adapter is its content hash."""


class AdapterClustering(Policy):
    """Serves first come, first served until `max_adapters` adapters are active. Then requests for
    active adapters go first, then those for adapters in pages, then others while slots are free.

    An adapter is active while an admitted request uses it. A request of several adapters counts as
    active, or as in pages, if all of them are. Bound: once a request has waited
    `max_wait_s`, nothing that arrived later is admitted before it.
    """

    def __init__(self, *, max_adapters: int, max_wait_s: float) -> None:
        self._max_adapters = max_adapters
        self._max_wait_s = max_wait_s
        self._active: Counter[str] = Counter()  # content hash -> admitted requests
        self._mixes: set[Mix] = set()  # that wait, and some that did

    def flow(self, request: Request) -> Hashable:
        content_hashes = request.versions
        if len(content_hashes) > 1:
            return tuple(sorted(content_hashes))
        return next(iter(content_hashes), BASE)

    def on_flow(self, request: Request) -> None:
        if isinstance(request.flow, tuple) and request.flow is not ADMITTED:
            self._mixes.add(request.flow)

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        """Take O(active adapters and waiting mixes) a walk and O(log n) a request.

        A walk that gets to adapters in pages takes O(adapters in pages) more.
        """
        yield from view.flows.get(ADMITTED, ())
        cursor = _Cursor(view)
        for aged in aged_prefix(view.by_age, now=context.now, max_wait_s=self._max_wait_s):
            if aged.flow is not ADMITTED:
                cursor.tried.add(aged)
                yield aged
        self._mixes.intersection_update(view.flows)
        active = _Heads(cursor, [BASE, *self._with_mixes(self._active)])
        resident: _Heads | None = None
        request: Request | None
        while True:
            source = None
            if len(self._active) < self._max_adapters:
                request = cursor.oldest()
            elif (request := active.pop()) is None:
                if resident is None:
                    resident = _Heads(cursor, self._with_mixes(set(context.resident())))
                source = resident
                request = resident.pop()
                if request is None and context.num_free > 0:
                    request = cursor.oldest()
            if request is None:
                return
            cursor.tried.add(request)
            yield request
            if self._is_active(request.flow):
                active.push(request.flow)
            elif source is not None:
                source.push(request.flow)

    def _with_mixes(self, content_hashes: Collection[str]) -> list[Hashable]:
        """Return the flows whose adapters are all among these."""
        return [*content_hashes, *(m for m in self._mixes if all(h in content_hashes for h in m))]

    def _is_active(self, flow: Hashable) -> bool:
        if isinstance(flow, tuple):
            return all(content_hash in self._active for content_hash in flow)
        return flow == BASE or flow in self._active

    def on_admitted(self, request: Request, now: float) -> None:
        self._active.update(request.versions.keys())

    def on_end(self, request: Request) -> None:
        if request.admitted_at >= 0:
            for content_hash in request.versions:
                self._active[content_hash] -= 1
                if not self._active[content_hash]:
                    del self._active[content_hash]

    def check_integrity(self, requests: Iterable[Request]) -> None:
        admitted = (request for request in requests if request.admitted_at >= 0)
        if Counter(h for request in admitted for h in request.versions) != self._active:
            raise IntegrityError("active adapters are counted wrongly")


class _Cursor:
    """Positions of one walk in each list; it passes over `tried` requests."""

    def __init__(self, view: WaitingView) -> None:
        self._view = view
        self._oldest = iter(view.by_age)
        self._positions: dict[Hashable, int] = {}
        self.tried: set[Request] = set()

    def oldest(self) -> Request | None:
        """Return the next untried request of all, and move on."""
        for request in self._oldest:
            if request.flow is not ADMITTED and request not in self.tried:
                return request
        return None

    def head(self, flow: Hashable) -> Request | None:
        """Return the first untried request of a flow."""
        requests = self._view.flows.get(flow, ())
        position = self._positions.get(flow, 0)
        while position < len(requests) and requests[position] in self.tried:
            position += 1
        self._positions[flow] = position
        return requests[position] if position < len(requests) else None


class _Heads:
    """First requests of some flows, oldest first."""

    def __init__(self, cursor: _Cursor, flows: Iterable[Hashable]) -> None:
        self._cursor = cursor
        self._heap: list[tuple[int, Hashable]] = []
        for flow in flows:
            self.push(flow)

    def push(self, flow: Hashable) -> None:
        head = self._cursor.head(flow)
        if head is not None:
            heappush(self._heap, (head.order, flow))

    def pop(self) -> Request | None:
        while self._heap:
            order, flow = heappop(self._heap)
            head = self._cursor.head(flow)
            if head is not None and head.order == order:  # else it was tried meanwhile
                return head
        return None
