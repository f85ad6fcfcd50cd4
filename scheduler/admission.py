"""Admission: which waiting requests start, in the policy's order.

A request starts when its adapters are resident and the pages for all its known tokens are there,
with one page to spare for each running request. A request of several adapters reserves and loads
all of them at once, or none. Pages come from the free list, then from idle prefix
blocks and adapters, then from adapters reserved for waiting requests of a higher rank.

Bounds of the wait:
- For pages: a request that lacks pages stops the walk, so no request behind it starts. Running
  requests end after max_tokens at the latest. What does not fit an empty pool was refused.
- For an adapter that is inspected or loaded: others start meanwhile. The loaded adapter stays
  reserved for the request that caused the load. Only requests of a lower rank can take it away, and
  those are finitely many. An adapter that was loaded ahead (prefetch.py) is reserved for the first
  request that comes to it with room for its KV.
- For adapter slots: only base-model requests start meanwhile, as they take no slot. A request never
  holds some of its slots while it waits for others, so two cannot wait for each other.
- For a prefix: a request whose next block is written by the step being planned waits for the next
  step. Others start meanwhile. Each wait makes its cached prefix longer by a block at least.
- For its turn in the order: each policy states its bound.

A load that has begun owns its slot and pages until it is answered, whatever becomes of the requests
that wait for it. This cannot block the pool: a running request that needs a page preempts others or
itself, and the answer to the load makes the adapter idle or frees it.
"""

from collections.abc import Callable, Hashable, Iterator
from enum import Enum, auto

from loraplex.memory.accounting.block_chain import BlockChain, BlockLabel, prefix_root
from loraplex.memory.accounting.kv_cache import NO_PREFIX, Prefix
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters.binding import weight_changes
from loraplex.scheduler.adapters.needs import AdapterNeeds
from loraplex.scheduler.adapters.prefetch import Prefetcher
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.policies.policy import Context, Policy
from loraplex.scheduler.request import Rank, Request
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.stats import SchedulerStats
from loraplex.scheduler.waiting_queue import WaitingQueue
from loraplex.scheduler.worker_protocol import AdapterLoaded, LoadAdapter, int_array

_MAX_SKIPPED = 256  # requests that one walk passes over for want of a slot or of a prefix


class _Verdict(Enum):
    STARTED = auto()
    PARKED = auto()  # until an adapter is loaded
    NO_SLOT = auto()
    NEXT_STEP = auto()  # it shares blocks that the step being planned writes
    NO_ROOM = auto()


class Admission:
    """Allocates pages to waiting requests and has their adapters loaded."""

    def __init__(
        self,
        *,
        memory: PageManager,
        waiting: WaitingQueue,
        policy: Policy,
        stats: SchedulerStats,
        base_fingerprint: str,
        send: Callable[[LoadAdapter], None],
    ) -> None:
        self._memory = memory
        self._waiting = waiting
        self._policy = policy
        self._stats = stats
        self._base_fingerprint = base_fingerprint
        self._send = send
        self._reserving: dict[Hashable, Request] = {}  # waiting requests that reserve adapters
        self._loading: dict[str, AdapterVersion] = {}  # content hash -> version whose path is read
        self._loading_ahead: set[str] = set()  # content hashes in _loading without a reservation
        self._prefetcher = Prefetcher(
            memory=memory, waiting=waiting, policy=policy, begin=self._load_ahead
        )
        self.lacked_room = False  # the last walk ended for want of pages, and none were freed since

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    def context(self, now: float, *, num_free_slots: int) -> Context:
        """Return the policy's context; a waiting request that reserves adapters has a slot."""
        return Context(
            now=now,
            num_free=num_free_slots - len(self._reserving),
            lacked_room=self.lacked_room,
            resident=self._resident,
        )

    def _resident(self) -> Iterator[str]:
        return (adapter.content_hash for adapter in self._memory.adapters)

    def admit(
        self, *, context: Context, num_running: int, start: Callable[[Request], bool]
    ) -> None:
        """Walk the queue in the policy's order and start what fits.

        Args:
            num_running: requests that run already.
            start: called for each request once its pages are allocated. Returns whether the step
                can take one more. Not called if the queue is empty.
        """
        now = context.now
        taken: list[Request] = []
        num_skipped = 0
        lacks_slot = False
        self.lacked_room = False
        for request in self._policy.order(self._waiting, context):
            request.rank = self._policy.rank(request, now)
            if lacks_slot and request.bindings:
                verdict = _Verdict.NO_SLOT
            else:
                verdict = self._try_start(request, num_running, context)
            if verdict is _Verdict.NO_ROOM:
                self.lacked_room = True
                break
            if verdict in (_Verdict.NO_SLOT, _Verdict.NEXT_STEP):
                lacks_slot = lacks_slot or verdict is _Verdict.NO_SLOT
                num_skipped += 1
                if num_skipped == _MAX_SKIPPED:
                    break
                continue
            taken.append(request)
            if verdict is _Verdict.STARTED:
                num_running += 1
                if not start(request):
                    break
        if taken:
            self._waiting.discard(taken)
            self._prefetcher.is_stale = True

    def prefetch(self, now: float, running: RunningRequests) -> None:
        """Load adapters of waiting requests ahead, where no other request has to wait for it."""
        # The context is the one that there will be once a slot is free.
        context = self.context(now, num_free_slots=len(self._reserving) + 1)
        self._prefetcher.run(context, running=running, num_loading=self.num_loading)

    def _note_admitted(self, request: Request, context: Context) -> None:
        context.num_free -= 1
        if request.admitted_at < 0:
            request.admitted_at = context.now
            self._policy.on_admitted(request, context.now)

    def _try_start(self, request: Request, num_running: int, context: Context) -> _Verdict:
        now = context.now
        # Preempted: its last ids come with a step's result, and then its mask.
        if request.has_tokens_in_flight or request.awaits_mask:
            return _Verdict.NO_ROOM
        needs = AdapterNeeds(request, self._memory.adapters)
        if needs.loading and not needs.missing and not self._are_ahead(needs.loading):
            self._waiting.park(request, needs.loading[0])
            return _Verdict.PARKED
        prefix, is_growing = self._find_prefix(request)
        if is_growing:
            return _Verdict.NEXT_STEP
        num_pages = self._memory.kv.num_pages_for(len(request.token_ids)) - len(prefix)
        while needs.missing and not needs.have_slots(self._memory.adapters):
            if not self.unreserve_newest(request.rank, now):
                return _Verdict.NO_SLOT
        num_pages += needs.num_missing_pages
        while self._num_available(prefix, needs) < num_pages + num_running:
            if not self.unreserve_newest(request.rank, now):
                return _Verdict.NO_ROOM
        if needs.loading or needs.missing:
            self._note_admitted(request, context)
            self._load(request, needs, now)
            return _Verdict.PARKED
        if request.uid not in self._reserving:  # else its slot is counted already
            self._note_admitted(request, context)
        self._allocate(request, prefix)
        return _Verdict.STARTED

    def _find_prefix(self, request: Request) -> Prefix:
        if request.chain is None:
            root = prefix_root(
                tenant=request.tenant, salt=request.salt, base_fingerprint=self._base_fingerprint
            )
            changes = weight_changes(request.bindings)
            first = changes[0][0] if changes else 0
            label = BlockLabel(request.adapter, first, request.tenant, request.salt)
            request.chain = BlockChain(root, self._memory.kv.block_tokens, changes, label)
        if not request.reads_prefix_cache:
            return NO_PREFIX
        return self._memory.kv.find_prefix(request.chain, request.token_ids)

    def _num_available(self, prefix: list[int], needs: AdapterNeeds) -> int:
        """Count available pages, less the idle ones that the request itself will use."""
        num_available = self._memory.num_available - self._memory.kv.num_idle_among(prefix)
        return num_available - needs.num_idle_pages

    def _are_ahead(self, content_hashes: list[str]) -> bool:
        """Tell whether any of these loads was begun ahead, and is reserved for nobody."""
        return any(content_hash in self._loading_ahead for content_hash in content_hashes)

    def begin_load(self, version: AdapterVersion, now: float) -> None:
        """Allocate a slot and pages, which must be available, and have the adapter copied there."""
        self._memory.make_adapter_slot()
        self._memory.make_room(version.num_pages)
        adapter = self._memory.adapters.allocate(
            version.content_hash, version.num_pages, now, num_bytes=version.num_bytes
        )
        self._loading[version.content_hash] = version
        self._stats.num_adapter_loads += 1
        self._send(
            LoadAdapter(
                adapter_slot=adapter.slot,
                content_hash=version.content_hash,
                path=version.path,
                page_ids=int_array(adapter.page_ids),
                after_step=adapter.num_planned - 1,
            )
        )

    def _load_ahead(self, version: AdapterVersion, now: float) -> None:
        self.begin_load(version, now)
        self._loading_ahead.add(version.content_hash)
        self._stats.num_adapter_prefetches += 1

    def _load(self, request: Request, needs: AdapterNeeds, now: float) -> None:
        """Reserve all adapters of a request, load those that are missing, and park the request."""
        adapters = self._memory.adapters
        for content_hash in (*needs.resident, *needs.loading):
            adapters.reserve(content_hash)  # first, so that no load evicts them
        for content_hash, version in needs.missing.items():
            self.begin_load(version, now)
            adapters.reserve(content_hash)
        request.reserves_adapters = True
        self._loading_ahead.difference_update(needs.loading)
        self._reserving[request.uid] = request
        self._waiting.park(request, [*needs.loading, *needs.missing][0])

    def _allocate(self, request: Request, prefix: list[int]) -> None:
        """Give a request that starts its adapters and the pages for all its known tokens."""
        if request.bindings and not request.reserves_adapters:
            for content_hash in request.versions:
                self._memory.adapters.reserve(content_hash)
            request.reserves_adapters = True
        self._reserving.pop(request.uid, None)
        kv, num_tokens = self._memory.kv, len(request.token_ids)
        assert request.chain is not None
        kv.open(request.uid, request.chain, prefix)
        self._memory.make_room(kv.num_pages_for(num_tokens) - len(prefix))
        kv.grow(request.uid, num_tokens)
        num_cached = len(prefix) * kv.block_tokens
        request.num_scheduled = request.num_registered = num_cached
        request.capacity = len(kv.page_ids(request.uid)) * kv.block_tokens
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_cached
        if request.reads_prefix_cache and kv.enable_prefix_caching:
            self._stats.prefix_query_tokens += num_tokens
            self._stats.prefix_hit_tokens += num_cached

    def unreserve_adapters(self, request: Request, now: float) -> None:
        """End the reservations of a request that ends, is preempted, or loses them while it
        waits."""
        self._prefetcher.is_stale = True
        self._reserving.pop(request.uid, None)
        if request.reserves_adapters:
            request.reserves_adapters = False
            for content_hash in request.versions:
                self._memory.adapters.unreserve(content_hash, now)

    def unreserve_newest(self, rank: Rank, now: float) -> bool:
        """End the reservations of the last waiting request by rank, if it comes after `rank`.

        A request keeps them while any of its adapters is loading. Returns whether a request lost
        its own.
        """
        reserving = [
            request
            for request in self._reserving.values()
            if self._loading.keys().isdisjoint(request.versions)
        ]
        newest = max(reserving, key=lambda request: request.rank, default=None)
        if newest is None or newest.rank <= rank:
            return False
        self.unreserve_adapters(newest, now)
        return True

    def on_loaded(self, event: AdapterLoaded, now: float) -> tuple[list[Request], AdapterVersion]:
        """Record the end of a load; a failed one frees its slot and pages.

        Returns:
            The requests that waited for it, now in no queue, and the version that was read.

        Raises:
            ValueError: no such load was asked for.
        """
        adapter = self._memory.adapters.get(event.content_hash)
        version = self._loading.pop(event.content_hash, None)
        if adapter is None or version is None or adapter.slot != event.adapter_slot:
            slot = event.adapter_slot
            raise ValueError(f"no such load was asked for: {event.content_hash} into slot {slot}")
        self._loading_ahead.discard(event.content_hash)
        self._prefetcher.is_stale = True
        requests = self._waiting.unpark(event.content_hash)
        if event.error:
            self._stats.num_adapter_load_failures += 1
            reserving = [r for r in self._reserving.values() if event.content_hash in r.versions]
            for request in reserving:
                self.unreserve_adapters(request, now)
            self._memory.adapters.fail_load(event.content_hash)
        else:
            self._stats.adapter_load_us += event.load_us
            self._memory.adapters.finish_load(event.content_hash, now)
        return requests, version
