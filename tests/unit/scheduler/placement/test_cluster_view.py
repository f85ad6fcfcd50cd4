"""The router's view: reports, and what was sent since, counted once."""

from random import Random

from loraplex.scheduler.placement.cluster_view import ClusterView
from loraplex.scheduler.placement.placement import place
from loraplex.scheduler.placement.placement_request import PlacementRequest

from helpers.scheduling.summaries import SEATS, report

REQUEST = PlacementRequest("hash", 64, 4)


def test_requests_that_no_report_counts_yet_take_seats_and_pages() -> None:
    view = ClusterView()
    view.apply("e0", report(), 0.0)
    placed = 0
    while decision := place(REQUEST, view.summaries(0.0), "least_loaded", Random(0)):
        view.on_sent(decision.engine_id, REQUEST)
        placed += 1
    assert placed == SEATS
    view.apply("e0", report(num_received=6, running=6, free_pages=70), 0.1)
    (engine,) = view.summaries(0.1)
    assert (engine.running, engine.waiting, engine.free_pages) == (6, 2, 70 - 2 * 4)


def test_adapters_come_and_go_by_deltas() -> None:
    view = ClusterView()
    view.apply("e0", report(adapters={"a": 0.0, "b": 0.2}), 0.0)
    view.on_sent("e0", PlacementRequest("c", 1, 1))
    view.apply("e0", report(adapters={"b": 0.0}, dropped_adapters=["a"]), 0.1)
    (engine,) = view.summaries(0.1)
    assert dict(engine.load_seconds) == {"b": 0.0, "c": 0.5}


def test_an_adapter_stays_where_it_was_sent_before_its_content_was_known() -> None:
    view = ClusterView()
    for name in ("e0", "e1", "e2"):
        view.apply(name, report(max_running=100), 0.0)
    unknown = PlacementRequest("", 8, 1, home="name")
    known = PlacementRequest("hash", 8, 1, home="name")
    chosen = []
    for request in (unknown, unknown, known, known):
        decision = place(request, view.summaries(0.0), "affinity", Random(0))
        assert decision is not None
        view.on_sent(decision.engine_id, request)
        chosen.append(decision.engine_id)
    assert len(set(chosen)) == 1
    view.apply(chosen[0], report(4, dropped_adapters=["hash"]), 0.1)
    assert not any(engine.holds("hash", "name") for engine in view.summaries(0.1))


def test_a_late_report_makes_an_engine_suspect_until_the_next() -> None:
    view = ClusterView()
    view.apply("e0", report(), 0.0)
    assert place(REQUEST, view.summaries(1.5), "random", Random(0)) is None
    view.apply("e0", report(), 1.6)
    assert place(REQUEST, view.summaries(2.0), "random", Random(0))


def test_nothing_goes_to_a_draining_engine() -> None:
    view = ClusterView()
    view.apply("e0", report(), 0.0)
    view.drain("e0")
    assert place(REQUEST, view.summaries(0.0), "random", Random(0)) is None
    view.remove("e0")
    assert "e0" not in view
    view.apply("e0", report(), 0.0)
    assert place(REQUEST, view.summaries(0.0), "random", Random(0))
