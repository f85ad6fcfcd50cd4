"""One line at info for each request that ends."""

import logging

import pytest

from loraplex.engine.frontend.inputs import TextCodec
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, FrontendHarness


@pytest.fixture
def harness(codec: TextCodec) -> FrontendHarness:
    return FrontendHarness(codec)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "loraplex.requests"]


def test_each_end_is_one_line(harness: FrontendHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex")
    harness.ask(A, request_id="one", adapter="pirate")
    harness.ask(A, request_id="two")
    harness.ask(A, request_id="three")
    first, second, _ = harness.take_sent(AddRequest)
    harness.output(first.request_id, [70], num_cached_tokens=2)
    assert not lines(caplog)
    harness.output(first.request_id, [71], finish_reason="length")
    harness.output(second.request_id, [], finish_reason="error", error="x", error_code="adapter")
    harness.ask(A, "cancel", request_id="three")
    one, two, three = lines(caplog)
    assert one.startswith("request 'one': adapter pirate, tokens: prompt 3, cached 2, output 2;")
    assert "first token none" not in one
    assert one.endswith("; length")
    assert "adapter none" in two and "first token none" in two and two.endswith("; adapter")
    assert three.endswith("; abort")


def test_id_cannot_forge_a_line(harness: FrontendHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex")
    request_id = "x\n2026-01-01 INFO root: request"
    harness.ask(A, request_id=request_id)
    harness.ask(A, "cancel", request_id=request_id)
    (line,) = lines(caplog)
    assert "\n" not in line


def test_silent_at_the_level_of_a_server(
    harness: FrontendHarness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "loraplex")
    harness.ask(A)
    harness.ask(A, "cancel")
    assert not lines(caplog)
