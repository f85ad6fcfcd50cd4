"""Cross-checks of the scheduler's state; tests call them after every operation."""

from collections import Counter
from collections.abc import Iterable

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.waiting_queue import WaitingQueue


def check_integrity(
    *,
    requests: Iterable[Request],
    running: RunningRequests,
    waiting: WaitingQueue,
    memory: PageManager,
    pinned: Iterable[str],
) -> None:
    """Raise IntegrityError unless each request is in one place and holds what it should.

    `pinned` are the content hashes that the user's pins reserve.
    """
    requests = list(requests)
    waiting.check_integrity()
    queued = set(waiting.by_age)
    parked = {request for request in requests if request.parked_on is not None}
    if len(queued) != len(waiting.by_age) or len(parked) != waiting.num_parked:
        raise IntegrityError("a request waits twice, or one that ended still waits")
    places = Counter([*running, *queued, *parked])
    if places != Counter(requests):
        raise IntegrityError("a request is in no queue, in two, or in one after its end")
    running.check_integrity()
    tables = {request.uid for request in running}
    if tables != set(memory.kv.request_ids()):
        raise IntegrityError("a page table belongs to no running request, or one has none")
    expected: Counter[str] = Counter(pinned)
    for request in requests:
        _check_request(request, memory)
        if request.reserves_adapters:
            expected.update(request.versions.keys())
    reserved = Counter({a.content_hash: a.num_reservations for a in memory.adapters})
    if +reserved != expected:
        raise IntegrityError(
            f"adapters are reserved {+reserved}, requests and the user reserve {expected}"
        )


def _check_request(request: Request, memory: PageManager) -> None:
    name = f"request {request.uid!r}"
    if not len(request.token_ids) <= request.num_total <= request.max_total:
        raise IntegrityError(f"{name} counts its tokens wrongly")
    if request.state is not RequestState.RUNNING:
        if request.slot != -1:
            raise IntegrityError(f"{name} waits in a slot")
        return
    page_ids = memory.kv.page_ids(request.uid)
    if request.capacity != len(page_ids) * memory.kv.block_tokens:
        raise IntegrityError(f"{name} counts its pages wrongly")
    if request.num_scheduled > request.capacity:
        raise IntegrityError(f"{name} was planned past its pages")
    if bool(request.bindings) != request.reserves_adapters:
        raise IntegrityError(f"{name} runs without a reservation of its adapters")
