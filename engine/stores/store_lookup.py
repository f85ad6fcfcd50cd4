"""Looks names up in the stores, in threads, and remembers the answers for a while."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from loraplex.engine.errors import ClientError, QueueFullError, client_error
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.store_config import StoreConfig
from loraplex.engine.stores.adapter_store import (
    UNAVAILABLE,
    AdapterStore,
    FolderLease,
    FoundAdapter,
)
from loraplex.engine.stores.deadline import Deadline, StoreTimeoutError
from loraplex.engine.stores.store_counts import StoreCounts

NUM_THREADS = 16
TENANT_THREADS = NUM_THREADS // 2  # of one tenant; its other look-ups wait
MAX_NAMES = 10_000  # remembered at one time, found or not
MAX_RUNNING = 2048  # look-ups that run or wait for a thread, half of them of one tenant
GRACE_S = 5.0  # for a thread beyond its time, before those who wait get an error

Answer = FoundAdapter | ClientError | None
Found = Callable[[Answer], None]

logger = logging.getLogger("loraplex.stores")


@dataclass(slots=True, eq=False)
class _Name:
    """A name that a tenant has asked for. `answer` is the last one, once `answered_at` is set."""

    name: str
    tenant: str
    waiting: list[Found] = field(default_factory=list)
    answer: Answer = None
    answered_at: float | None = None
    deadline: Deadline | None = None  # of the look-up that runs


@dataclass(slots=True, eq=False)
class _Queue:
    """The look-ups of one tenant: those that have a thread, and those that wait for one."""

    num_busy: int = 0
    waiting: deque[tuple[_Name, Answer, Deadline]] = field(default_factory=deque)


class StoreLookup:
    """Answers from one thread; only the stores run in others.

    An answer holds for `adapter_store_ttl_s`. After that a name that was found is still served as
    it is, and is looked up in the background; the next request gets what was found then.
    """

    def __init__(
        self,
        stores: Sequence[AdapterStore],
        config: StoreConfig,
        wakeup: Wakeup,
        *,
        counts: StoreCounts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wakeup` is set when run_ready() has something to do; `counts` gets the look-ups."""
        self._stores = stores
        self._ttl_s = config.adapter_store_ttl_s
        self._timeout_s = config.adapter_store_timeout_s
        self._wakeup = wakeup
        self._counts = counts or StoreCounts()
        self._clock = clock
        self._closed = threading.Event()
        self._names: OrderedDict[tuple[str, str], _Name] = OrderedDict()
        self._running: set[_Name] = set()
        self._queues: dict[str, _Queue] = {}  # by tenant; none is empty and idle
        self._answers: deque[tuple[_Name, Answer, bool]] = deque()  # and whether a store was asked
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adapter-store")

    @property
    def roots(self) -> list[str]:
        """The addresses of the stores, for error texts."""
        return [store.root for store in self._stores]

    @property
    def num_names(self) -> int:
        """Number of names that are remembered."""
        return len(self._names)

    @property
    def num_running(self) -> int:
        """Number of look-ups whose answers have not been handed out."""
        return len(self._running)

    def has_found(self, name: str, tenant: str) -> bool:
        """Tells whether the last answer about a name was an adapter."""
        entry = self._names.get((tenant, name))
        return entry is not None and isinstance(entry.answer, FoundAdapter)

    def find(self, name: str, tenant: str, then: Found) -> None:
        """Calls `then` with the adapter, None if no store has it, or the reason why not.

        It calls at once if the answer is known, else from run_ready(). The callee releases the
        lease of the adapter.
        """
        key = (tenant, name)
        entry = self._names.get(key)
        if entry is None:
            entry = self._names[key] = _Name(name, tenant)
        self._names.move_to_end(key)
        answer = entry.answer
        if isinstance(answer, FoundAdapter) and _share(answer.lease):
            if not self._is_fresh(entry):
                self._start(entry)
            then(answer)
        elif not isinstance(answer, FoundAdapter) and self._is_fresh(entry):
            then(answer)
        else:
            entry.waiting.append(then)
            self._start(entry)
        self._forget_old()

    def run_ready(self) -> None:
        """Hands out the answers that have come."""
        while self._answers:
            entry, answer, was_asked = self._answers.popleft()
            self._running.discard(entry)
            entry.deadline = None
            self._queues[entry.tenant].num_busy -= 1
            self._submit(entry.tenant)
            self._take(entry, answer, was_asked)

    def tick(self) -> None:
        """Answers those whose look-up hangs. Call it now and then."""
        for entry in list(self._running):
            deadline = entry.deadline
            if entry.waiting and deadline and deadline.overdue_s > GRACE_S:
                text = f"a store does not answer within {self._timeout_s:g} s"
                self._hand_out(entry, client_error(UNAVAILABLE, text))

    def close(self) -> None:
        """Ends the look-ups."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _, answer, _ in self._answers:
            _release(answer)
        self._answers.clear()

    def _is_fresh(self, entry: _Name) -> bool:
        at = entry.answered_at
        return at is not None and self._clock() - at < self._ttl_s

    def _start(self, entry: _Name) -> None:
        if entry.deadline is not None:
            return
        queue = self._queues.get(entry.tenant) or _Queue()
        most = MAX_RUNNING // 2 if entry.tenant else MAX_RUNNING
        if len(self._running) >= MAX_RUNNING or queue.num_busy + len(queue.waiting) >= most:
            self._hand_out(entry, QueueFullError("too many adapters are being looked up in stores"))
            return
        self._running.add(entry)
        entry.deadline = Deadline(self._timeout_s, self._closed)
        former = entry.answer if self._is_fresh(entry) else None
        self._queues[entry.tenant] = queue
        queue.waiting.append((entry, former, entry.deadline))
        self._submit(entry.tenant)

    def _submit(self, tenant: str) -> None:
        """Gives the threads what they may take of a tenant's look-ups."""
        queue = self._queues[tenant]
        most = TENANT_THREADS if tenant else NUM_THREADS
        while queue.waiting and queue.num_busy < most:
            queue.num_busy += 1
            self._threads.submit(self._look, *queue.waiting.popleft())
        if not queue.num_busy:
            del self._queues[tenant]

    def _look(self, entry: _Name, former: Answer, deadline: Deadline) -> None:
        answer: Answer = former.reopen() if isinstance(former, FoundAdapter) else None
        was_asked = answer is None
        if was_asked:
            answer = self._ask_stores(entry.name, entry.tenant, deadline)
            self._counts.count_lookup(_result_of(answer))
        self._answers.append((entry, answer, was_asked))
        self._wakeup.set()

    def _ask_stores(self, name: str, tenant: str, deadline: Deadline) -> Answer:
        try:
            for store in self._stores:
                deadline.check()
                answer = store.find(name, tenant, deadline)
                if answer is not None:
                    return answer
            return None
        except ClientError as error:
            return error
        except StoreTimeoutError as error:
            return client_error(UNAVAILABLE, f"adapter {name!r}: {error}")
        except Exception as error:
            logger.exception("looking up adapter %r failed", name)
            return client_error(UNAVAILABLE, f"adapter {name!r}: {type(error).__name__}: {error}")

    def _take(self, entry: _Name, answer: Answer, was_asked: bool) -> None:
        is_passing = isinstance(answer, ClientError) and answer.code == UNAVAILABLE
        if is_passing and isinstance(entry.answer, FoundAdapter) and not entry.waiting:
            logger.warning("adapter %r is served as it is: %s", entry.name, answer)
            entry.answered_at = self._clock()
            return
        entry.answer = answer
        if was_asked:
            entry.answered_at = None if is_passing else self._clock()
        self._hand_out(entry, answer)
        _release(answer)

    def _hand_out(self, entry: _Name, answer: Answer) -> None:
        waiting, entry.waiting = entry.waiting, []
        for then in waiting:
            if isinstance(answer, FoundAdapter):
                _share(answer.lease)
            then(answer)

    def _forget_old(self) -> None:
        for key, entry in list(self._names.items())[: max(0, len(self._names) - MAX_NAMES)]:
            if entry.deadline is None and not entry.waiting:
                del self._names[key]


def _result_of(answer: Answer) -> str:
    if isinstance(answer, ClientError):
        return "unavailable" if answer.code == UNAVAILABLE else "refused"
    return "missing" if answer is None else "found"


def _share(lease: FolderLease | None) -> bool:
    return lease is None or lease.share()


def _release(answer: Answer) -> None:
    if isinstance(answer, FoundAdapter) and answer.lease is not None:
        answer.lease.release()
