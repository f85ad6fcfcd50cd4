"""Reports of load: at once when asked for, often under load, now and then when idle."""

import pytest

from loraplex.engine.processes.load_reports import HEARTBEAT_S, REPORT_S, LoadReports

from helpers.scheduling.scheduler_harness import Harness

ROUTER, OTHER = b"router", b"frontend-0"


def test_reports_come_at_once_then_by_load() -> None:
    harness = Harness()
    harness.now = 100.0
    reports = LoadReports(harness.scheduler)
    assert reports.due_s is None and not reports.take()
    reports.add(ROUTER)
    ((peer, first),) = reports.take()
    assert (peer, first.num_received) == (ROUTER, 0)
    assert reports.due_s == pytest.approx(HEARTBEAT_S)

    reports.on_request(ROUTER)
    reports.on_request(OTHER)
    harness.add(0, [1, 2, 3], max_tokens=2)
    assert reports.due_s == pytest.approx(REPORT_S) and not reports.take()
    harness.now += 1.01 * REPORT_S
    ((_, busy),) = reports.take()
    assert (busy.num_received, busy.waiting) == (1, 1)

    harness.run()
    harness.now += 1.01 * REPORT_S
    ((_, ended),) = reports.take()  # the end is reported as soon as the load
    assert (ended.running, ended.waiting) == (0, 0)
    assert reports.due_s == pytest.approx(HEARTBEAT_S)
    reports.remove(ROUTER)
    assert reports.due_s is None
