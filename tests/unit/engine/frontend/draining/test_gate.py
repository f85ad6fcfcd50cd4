"""A frontend that drains refuses requests once its grace is over."""

import pytest

from loraplex.engine.errors import ClientError
from loraplex.engine.frontend.draining.gate import Gate
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, FrontendHarness


def test_a_gate_closes_after_its_grace() -> None:
    now = [100.0]
    gate = Gate(clock=lambda: now[0])
    gate.check()
    assert not gate.is_closing
    gate.close_in(5.0)
    now[0] = 104.0
    gate.check()
    assert gate.is_closing and gate.closes_in_s == 1.0
    now[0] = 105.0
    with pytest.raises(ClientError) as raised:
        gate.check()
    assert raised.value.code == "draining" and gate.closes_in_s == 0.0


def test_a_closed_frontend_serves_what_it_has_accepted(codec: TextCodec) -> None:
    harness = FrontendHarness(codec)
    harness.ask(A, request_id="early")
    (added,) = harness.take_sent(AddRequest)
    harness.frontend.gate.close_in(0.0)
    harness.ask(A, request_id="late")
    harness.ask(A, "health", request_id="h")
    refused, health = harness.take(A)
    assert (refused["request_id"], refused["code"]) == ("late", "draining")
    assert health["status"] == "draining"
    assert not harness.frontend.is_idle
    harness.output(added.request_id, [70], finish_reason="length")
    (last,) = harness.take(A)
    assert last["request_id"] == "early" and last["finished"]
    assert harness.frontend.is_idle
