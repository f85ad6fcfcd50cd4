"""A request that does not end within its timeout_s, or the server's, fails by name."""

import time
from collections.abc import Callable

import pytest

from loraplex.engine.config import ServerConfig
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, B, FrontendHarness


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds since the first call."""
    began = time.monotonic()
    now = [began]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = began + seconds

    return set_to


def test_a_request_fails_when_its_time_is_over(
    codec: TextCodec, at: Callable[[float], None]
) -> None:
    harness = FrontendHarness(codec)
    harness.ask(A, request_id="short", timeout_s=2)
    harness.ask(A, request_id="long", timeout_s=60.5)
    harness.ask(B, request_id="free")
    short, long, free = harness.take_sent(AddRequest)
    harness.output(short.request_id, [70])
    at(1.9)
    harness.frontend.tick()
    assert [reply["type"] for reply in harness.take()] == ["output"]
    at(2.1)
    harness.frontend.tick()
    (failure,) = [reply for reply in harness.take() if reply["type"] != "ping"]
    assert (failure["request_id"], failure["code"]) == ("short", "timeout")
    assert failure["message"] == "the request did not end within 2 s (timeout_s)"
    ((aborted,),) = [list(message.request_ids) for message in harness.sent]
    assert aborted == short.request_id
    at(1e6)
    harness.output(long.request_id, [71], finish_reason="length")
    harness.frontend.tick()
    harness.output(free.request_id, [71], finish_reason="length")
    ended = [reply for reply in harness.take() if reply["type"] != "ping"]
    assert [(reply["request_id"], reply["finished"]) for reply in ended] == [
        ("long", True), ("free", True),
    ]  # fmt: skip


def test_the_server_limits_all_requests(codec: TextCodec, at: Callable[[float], None]) -> None:
    harness = FrontendHarness(codec, server=ServerConfig(request_timeout=5.0))
    harness.ask(A, request_id="default")
    harness.ask(A, request_id="longer", timeout_s=500)
    harness.ask(A, request_id="shorter", timeout_s=1)
    harness.take_sent(AddRequest)
    at(1.5)
    harness.frontend.tick()
    assert [reply["request_id"] for reply in harness.take()] == ["shorter"]
    at(5.5)
    harness.frontend.tick()
    failures = [reply for reply in harness.take() if reply["type"] == "error"]
    assert {(reply["request_id"], reply["message"]) for reply in failures} == {
        (name, "the request did not end within 5 s (timeout_s)") for name in ("default", "longer")
    }


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), True, "5"])
def test_other_values_are_refused(codec: TextCodec, value: object) -> None:
    harness = FrontendHarness(codec)
    harness.ask(A, timeout_s=value)
    (reply,) = harness.take(A)
    assert reply["code"] == "bad_request" and reply["message"].startswith("timeout_s: must be")
