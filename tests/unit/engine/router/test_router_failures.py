"""Failures that a router must outlive: its own pauses, bad engines, and requests that kill."""

import resource
from array import array
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.ipc.channel import InprocChannel
from loraplex.engine.ipc.messages.frontend import AdapterCommand
from loraplex.engine.router.adapter_book import AdapterBook
from loraplex.engine.router.adapter_log import AdapterLog
from loraplex.engine.router.engine_watch import GIVE_UP_S, NO_ENGINE_S
from loraplex.engine.router.request_book import MAX_DEATHS
from loraplex.scheduler.frontend_protocol import (
    AdapterSource,
    AddRequest,
    SequenceOutput,
    StepOutputs,
)
from loraplex.scheduler.placement.engine_report import EngineReport

from helpers.fakes.fake_engine import expected_tokens
from helpers.fakes.fake_model import sampling_spec
from helpers.running.routed_engines import RoutedEngines


def ask(request_id: int, *, max_tokens: int) -> AddRequest:
    return AddRequest(request_id, array("i", [1, 2]), sampling_spec(max_tokens=max_tokens))


def check(cluster: RoutedEngines, request_id: int, max_tokens: int) -> None:
    expected = expected_tokens([1, 2], max_tokens=max_tokens)
    assert list(cluster.tokens(request_id)) == expected


def holder(cluster: RoutedEngines) -> str:
    """The engine with the only request that runs."""
    (engine_id,) = [k for k, e in cluster.engines.items() if e.scheduler.num_unfinished]
    return engine_id


def test_a_long_stream_outlives_a_short_time_without_engines() -> None:
    cluster = RoutedEngines(1)
    cluster.turn()
    cluster.add(ask(0, max_tokens=150))
    for _ in range(70):
        cluster.turn(1.0)
    assert 60 < len(cluster.tokens(0)) < 150, "it has run for longer than a request waits"
    cluster.kill(cluster.channel.engine_ids[0])
    cluster.turn(NO_ENGINE_S / 2)
    cluster.start_engine()
    cluster.finish()
    check(cluster, 0, 150)


def test_a_router_that_was_stopped_gives_no_engine_up() -> None:
    cluster = RoutedEngines(2)
    cluster.turn()
    cluster.add(ask(0, max_tokens=9))
    cluster.turn()
    cluster.now += 20 * GIVE_UP_S
    cluster.hear()  # what the engines have sent meanwhile has not been read yet
    assert len(cluster.channel.engine_ids) == 2
    cluster.finish()
    check(cluster, 0, 9)
    assert cluster.channel.book.num_moves == 0
    cluster.hung.update(cluster.engines)
    for _ in range(20):
        cluster.turn(GIVE_UP_S / 8)
    assert not cluster.channel.engine_ids


def test_an_engine_of_another_version_is_left() -> None:
    cluster = RoutedEngines(1)
    engine, link = InprocChannel.pair(b"router")
    cluster.channel.add_engine("other", link)
    engine.send_encoded(b"hello", b"router")
    cluster.add(ask(0, max_tokens=9))
    cluster.finish()
    assert "other" not in cluster.channel.engine_ids
    check(cluster, 0, 9)


class ManualEngine:
    """An engine that the test plays. It has 64 free seats."""

    def __init__(self, cluster: RoutedEngines) -> None:
        self.channel, link = InprocChannel.pair(b"router")
        cluster.channel.add_engine("manual", link)
        self.num_received = 0

    def take(self) -> list[AddRequest]:
        messages: list[Any] = [message for _, message in self.channel.receive()]
        requests = [message for message in messages if isinstance(message, AddRequest)]
        self.num_received += len(requests)
        return requests

    def report(self) -> None:
        report = EngineReport(self.num_received, 0, 0, 64, 0, 400, 400, 0.0, 0.0, 0.01)
        self.channel.send(report, b"router")

    def refuse(self, request: AddRequest) -> None:
        full = SequenceOutput(
            request.request_id, array("i"), finish_reason="error", error_code="queue_full"
        )
        self.channel.send(StepOutputs(array("q"), array("i"), [full]), b"router")


def test_an_engine_that_refuses_a_request_is_asked_again_after_its_next_report() -> None:
    cluster = RoutedEngines(0)
    engine = ManualEngine(cluster)
    engine.report()
    cluster.add(ask(0, max_tokens=9))
    for _ in range(3):
        cluster.hear()
        (request,) = engine.take()
        engine.refuse(request)
        for _ in range(5):
            cluster.hear()
            assert not engine.take()
        engine.report()
    assert not cluster.outputs[0]
    other = cluster.start_engine()
    engine.report()
    cluster.hear()
    for request in engine.take():
        engine.refuse(request)
    cluster.finish()
    check(cluster, 0, 9)
    assert other in cluster.engines


def test_a_request_that_every_engine_dies_with_fails_and_spares_the_others() -> None:
    cluster = RoutedEngines(1)
    cluster.turn()
    cluster.add(ask(0, max_tokens=100))
    for death in range(MAX_DEATHS):
        assert not cluster.outputs[0] or not cluster.outputs[0][-1].finish_reason, death
        cluster.turn()
        cluster.turn()
        victim = holder(cluster)
        cluster.start_engine()
        cluster.kill(victim)
    cluster.hear()
    (last,) = cluster.outputs[0][-1:]
    assert last.error_code == "engine_dead" and f"{MAX_DEATHS} engines" in last.error
    cluster.add(ask(1, max_tokens=9))
    cluster.finish()
    check(cluster, 1, 9)


def test_engines_that_are_drained_do_not_count_as_dead() -> None:
    cluster = RoutedEngines(1)
    cluster.turn()
    cluster.add(ask(0, max_tokens=100))
    for _ in range(2 * MAX_DEATHS):
        cluster.turn()
        cluster.turn()
        former = holder(cluster)
        cluster.start_engine()
        cluster.channel.drain_engine(former)
        cluster.turn()
        cluster.kill(former)
    cluster.finish()
    check(cluster, 0, 100)


def test_a_full_disk_leaves_the_log_of_adapters_readable(tmp_path: Path) -> None:
    def load(name: str) -> AdapterCommand:
        return AdapterCommand(1, "load", name, AdapterSource("/a", "/a", "stamp"), "tenant")

    path = tmp_path / "log"
    one, other = (AdapterBook(AdapterLog(path)) for _ in range(2))
    one.on_done(load("a"))
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, former[1]))
    try:
        one.on_done(load("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    one.on_done(load("c"))
    assert [command.name for command in one.replay(-1)] == ["a", "b", "c"]
    assert [command.name for command in other.replay(-1)] == ["a", "c"]
    assert [c.name for c in AdapterBook(AdapterLog(path)).replay(-1)] == ["a", "c"]
    with pytest.raises(OSError, match="File too large|No space"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, former[1]))
        try:
            AdapterLog(path).append(load("d"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
