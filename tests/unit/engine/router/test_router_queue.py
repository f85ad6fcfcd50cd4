"""The order of the requests that wait in the router."""

from array import array
from random import Random

import pytest

from loraplex.engine.router.request_book import RequestBook
from loraplex.engine.router.routed_request import RoutedRequest
from loraplex.engine.router.router_queue import MIN_KNOWN, FairQueue, make_waiting_queue
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AddRequest, StepOutputs

from helpers.fakes.fake_model import sampling_spec

FAIR = SchedulerConfig(policy="vtc", fair_share_by="tenant")


def add(
    book: RequestBook, request_id: int, tenant: str = "", *, prompt: int = 10, **fields: int
) -> None:
    ids = array("i", range(prompt))
    book.add(AddRequest(request_id, ids, sampling_spec(), tenant=tenant, **fields), 0.0)


def send(book: RequestBook, engine_id: str = "e") -> RoutedRequest:
    request = book.first_waiting()
    assert request is not None
    book.start(request, engine_id)
    book.check_integrity()
    return request


def generate(book: RequestBook, request: RoutedRequest, count: int) -> None:
    for token in range(count):
        book.on_outputs(StepOutputs(array("q", [request.attempt]), array("i", [token]), []))


def send_all(book: RequestBook) -> list[int]:
    return [send(book).message.request_id for _ in range(book.num_waiting)]


def test_by_default_priority_then_arrival() -> None:
    book = RequestBook(make_waiting_queue(SchedulerConfig()))
    for request_id, priority in ((1, 0), (2, 1), (3, -1), (4, 0)):
        add(book, request_id, priority=priority)
    assert send_all(book) == [3, 1, 4, 2]


def test_a_tenant_that_floods_the_router_does_not_hold_up_another() -> None:
    book = RequestBook(make_waiting_queue(FAIR))
    for request_id in range(10):
        add(book, request_id, "greedy")
    for request_id in (10, 11):
        add(book, request_id, "modest")
    assert send_all(book)[:4] == [0, 10, 1, 11]


def test_generated_tokens_of_all_engines_count() -> None:
    book = RequestBook(make_waiting_queue(FAIR))
    for request_id in range(4):
        add(book, request_id, "ab"[request_id % 2])
    generate(book, send(book, "e0"), 20)  # 0, of a
    assert send(book, "e1").message.request_id == 1
    assert send(book, "e1").message.request_id == 3, "a has had 50, b 20"


def test_weights_divide_the_service() -> None:
    config = SchedulerConfig(
        policy="vtc", fair_share_by="tenant", fair_share_weights=(("big", "3"),)
    )
    book = RequestBook(make_waiting_queue(config))
    for request_id in range(40):
        add(book, request_id, "big" if request_id < 20 else "small")
    first = send_all(book)[:16]
    assert sum(1 for request_id in first if request_id < 20) == 12


def test_service_is_not_saved_up_while_a_tenant_is_away() -> None:
    book = RequestBook(make_waiting_queue(FAIR))
    for request_id in range(10):
        add(book, request_id, "busy")
    for _ in range(5):
        generate(book, send(book), 10)
    for request_id in range(10, 20):
        add(book, request_id, "new")
    order = send_all(book)
    assert sum(1 for request_id in order[:6] if request_id >= 10) == 3


def test_requests_of_a_lost_engine_go_first() -> None:
    book = RequestBook(make_waiting_queue(FAIR))
    add(book, 1, "a")
    generate(book, send(book, "dies"), 50)
    add(book, 2, "b")
    book.recall("dies")
    assert send_all(book) == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_fairness_bound_over_random_requests(seed: int) -> None:
    """Service of two tenants that always wait differs by 2 max(w_p L, w_q M) at most."""
    random = Random(seed)
    book = RequestBook(make_waiting_queue(FAIR))
    service = {"a": 0, "b": 0}
    running: list[RoutedRequest] = []
    longest, answer, seats = 30, 20, 4
    for request_id in range(600):
        add(book, request_id, "ab"[request_id % 2], prompt=random.randint(1, longest))
    while book.num_waiting > 100:
        while len(running) < seats:
            running.append(send(book, random.choice("xyz")))
            message = running[-1].message
            service[message.tenant] += len(message.prompt_token_ids)
        request = running.pop(random.randrange(seats))
        count = random.randint(1, answer)
        generate(book, request, count)
        service[request.message.tenant] += 2 * count
        book.end(request.message.request_id)
        assert abs(service["a"] - service["b"]) <= 2 * max(longest, 2 * seats * answer)


def test_clients_without_requests_are_forgotten() -> None:
    book = RequestBook(FairQueue(by_adapter=False, weights={}))
    for request_id in range(3 * MIN_KNOWN):
        add(book, request_id, f"tenant {request_id}")
        send(book)
        book.end(request_id)
    book.check_integrity()
