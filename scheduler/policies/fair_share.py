"""Fair shares by virtual token counters (Sheng et al., OSDI 2024, arXiv 2401.00588)."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import takewhile

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.policies.policy import ADMITTED, Context, Policy, WaitingView
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.step_builder import StepBuilder

PROMPT_WEIGHT = 1.0  # w_p: service of a prompt token
OUTPUT_WEIGHT = 2.0  # w_q: service of a generated token

_MIN_KNOWN = 1024  # clients remembered before any is forgotten


@dataclass(slots=True)
class _Client:
    """One client: the service it received, divided by its weight, and its requests."""

    weight: float
    counter: float = 0.0
    num_waiting: int = 0  # never admitted
    num_unfinished: int = 0


class VirtualTokenCounters(Policy):
    """Serves next the client (tenant or adapter) that got the least service per weight.

    A request is charged PROMPT_WEIGHT for each prompt token when it is admitted and OUTPUT_WEIGHT
    for each token when it is generated. A client that comes back after a pause is lifted to the
    least counter of the clients that wait, so that no client saves up service.

    Bounds:
    - Fairness: over any time in which two clients of equal weight always have requests waiting that
      can start, their service differs by at most 2 * max(w_p * L, w_q * M), L the longest prompt, M
      the tokens that admitted requests may hold (their KV; with preemptions, what they may still
      generate). Weights divide the service.
    - Wait: a client unserved for `max_wait_s` goes before all that were served, or came, later.
      So a request with k requests of its client ahead is admitted after at most k + 1 such turns.
    """

    def __init__(
        self, *, by_adapter: bool, weights: Mapping[str, float], max_wait_s: float
    ) -> None:
        self._by_adapter = by_adapter
        self._configured = weights
        self._weights = weights
        self._max_wait_s = max_wait_s
        self._clients: dict[str, _Client] = {}
        self._max_known = _MIN_KNOWN
        self._last_left = 0.0  # counter of the client that stopped waiting last
        self._unserved: OrderedDict[str, float] = OrderedDict()  # waiting client -> since when
        # (counter, order, client) of all flows; a counter only grows, so a stale entry is too low
        self._heap: list[tuple[float, int, str]] = []
        self._in_heap: set[str] = set()
        self._exhausted: list[tuple[float, int, str]] = []  # taken out during the last walk

    def counters(self) -> dict[str, float]:
        """Return the weighted service of each known client."""
        return {name: client.counter for name, client in self._clients.items()}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        if self._by_adapter:
            return
        self._weights = {**self._configured, **weights}
        for name, client in self._clients.items():
            client.weight = self._weights.get(name, 1.0)

    def flow(self, request: Request) -> Hashable:
        return self._name(request)

    def _name(self, request: Request) -> str:
        return request.adapter if self._by_adapter else request.tenant or request.salt

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        """Take O(log n) for each request."""
        yield from view.flows.get(ADMITTED, ())
        self._restore()
        flows, taken = view.flows, Counter[str]()
        oldest_served = context.now - self._max_wait_s
        for name, _ in list(takewhile(lambda kv: kv[1] <= oldest_served, self._unserved.items())):
            if name in flows:
                taken[name] += 1
                yield flows[name][0]
        while self._heap:
            entry = self._heap[0]
            name = entry[2]
            flow = flows.get(name)
            if flow is None:
                heappop(self._heap)
                self._in_heap.discard(name)
                continue
            if taken[name] == len(flow):
                self._exhausted.append(heappop(self._heap))
                continue
            request = flow[taken[name]]
            current = (self._clients[name].counter, request.order, name)
            if entry != current:
                heapreplace(self._heap, current)
            else:
                taken[name] += 1
                yield request

    def _restore(self) -> None:
        for entry in self._exhausted:
            heappush(self._heap, entry)
        self._exhausted.clear()

    def on_flow(self, request: Request) -> None:
        name = self._name(request)
        if request.flow is not ADMITTED and name not in self._in_heap:
            self._in_heap.add(name)
            heappush(self._heap, (self._clients[name].counter, request.order, name))

    def on_arrival(self, request: Request, now: float) -> None:
        client = self._client(self._name(request))
        if not client.num_waiting:
            client.counter = max(client.counter, self._least_waiting())
            self._unserved[self._name(request)] = now
        client.num_waiting += 1
        client.num_unfinished += 1

    def on_admitted(self, request: Request, now: float) -> None:
        name = self._name(request)
        client = self._clients[name]
        client.counter += PROMPT_WEIGHT * request.num_prompt_tokens / client.weight
        self._leave(name)
        if client.num_waiting:
            self._unserved[name] = now
            self._unserved.move_to_end(name)

    def on_result(self, step: StepBuilder, now: float) -> None:
        clients, name_of = self._clients, self._name
        for request, num_new in zip(step.requests, step.num_new, strict=True):
            if num_new and request.state is not RequestState.FINISHED:
                client = clients[name_of(request)]
                client.counter += num_new * OUTPUT_WEIGHT / client.weight

    def on_end(self, request: Request) -> None:
        name = self._name(request)
        self._clients[name].num_unfinished -= 1
        if request.admitted_at < 0:
            self._leave(name)

    def _leave(self, name: str) -> None:
        """Count one waiting request of the client less."""
        client = self._clients[name]
        client.num_waiting -= 1
        if not client.num_waiting:
            self._last_left = client.counter
            del self._unserved[name]

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            if len(self._clients) >= self._max_known:
                self._forget()
            client = self._clients[name] = _Client(self._weights.get(name, 1.0))
        return client

    def _forget(self) -> None:
        """Forget clients whose counters no longer matter. Amortized O(1), as the limit doubles."""
        floor = self._least_waiting()
        kept = {n: c for n, c in self._clients.items() if c.num_unfinished or c.counter > floor}
        self._clients = kept
        self._max_known = max(_MIN_KNOWN, 2 * len(kept))

    def _least_waiting(self) -> float:
        """Return the least counter of the clients whose requests can start.

        If none can, return that of the client that stopped waiting last.
        """
        self._restore()
        while self._heap:
            counter, order, name = self._heap[0]
            client = self._clients.get(name)
            if client is None or not client.num_waiting:
                heappop(self._heap)
                self._in_heap.discard(name)
            elif counter < client.counter:
                heapreplace(self._heap, (client.counter, order, name))
            else:
                return counter
        return self._last_left

    def check_integrity(self, requests: Iterable[Request]) -> None:
        unfinished: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for request in requests:
            unfinished[self._name(request)] += 1
            waiting[self._name(request)] += request.admitted_at < 0
        for name, client in self._clients.items():
            if (client.num_unfinished, client.num_waiting) != (unfinished[name], waiting[name]):
                raise IntegrityError(f"the requests of client {name!r} are counted wrongly")
        if set(self._unserved) != set(+waiting) or unfinished.keys() - self._clients.keys():
            raise IntegrityError("the clients that wait are not those with waiting requests")
