"""Adapter clustering (S-LoRA, arXiv 2311.03285, section 4.2): run few adapters at a time."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from heapq import heappop, heappush

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.policies.policy import ADMITTED, Context, Policy, WaitingView, aged_prefix
from loraplex.scheduler.request import Request

BASE = ""  # the flow of the base model, which costs a step no adapter


class AdapterClustering(Policy):
    """Serves first come, first served until `max_adapters` adapters are active. Then requests for
    active adapters go first, then those for adapters in pages, then others while slots are free.

    An adapter is active while an admitted request uses it. Bound: once a request has waited
    `max_wait_s`, nothing that arrived later is admitted before it.
    """

    def __init__(self, *, max_adapters: int, max_wait_s: float) -> None:
        self._max_adapters = max_adapters
        self._max_wait_s = max_wait_s
        self._active: Counter[Hashable] = Counter()  # content hash -> admitted requests

    def flow(self, request: Request) -> Hashable:
        return _adapter(request)

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        """Take O(active adapters) a walk and O(log n) a request.

        A walk that gets to adapters in pages takes O(adapters in pages) more.
        """
        yield from view.flows.get(ADMITTED, ())
        cursor = _Cursor(view)
        for aged in aged_prefix(view.by_age, now=context.now, max_wait_s=self._max_wait_s):
            if aged.flow is not ADMITTED:
                cursor.tried.add(aged)
                yield aged
        active = _Heads(cursor, [BASE, *self._active])
        resident: _Heads | None = None
        request: Request | None
        while True:
            source = None
            if len(self._active) < self._max_adapters:
                request = cursor.oldest()
            elif (request := active.pop()) is None:
                source = resident = resident or _Heads(cursor, context.resident())
                request = resident.pop()
                if request is None and context.num_free > 0:
                    request = cursor.oldest()
            if request is None:
                return
            cursor.tried.add(request)
            yield request
            if request.flow == BASE or request.flow in self._active:
                active.push(request.flow)
            elif source is not None:
                source.push(request.flow)

    def on_admitted(self, request: Request, now: float) -> None:
        if request.adapter_version is not None:
            self._active[_adapter(request)] += 1

    def on_end(self, request: Request) -> None:
        if request.adapter_version is not None and request.admitted_at >= 0:
            adapter = _adapter(request)
            self._active[adapter] -= 1
            if not self._active[adapter]:
                del self._active[adapter]

    def check_integrity(self, requests: Iterable[Request]) -> None:
        admitted = (r for r in requests if r.adapter_version is not None and r.admitted_at >= 0)
        if Counter(map(_adapter, admitted)) != self._active:
            raise IntegrityError("active adapters are counted wrongly")


def _adapter(request: Request) -> str:
    return request.adapter_version.content_hash if request.adapter_version else BASE


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
