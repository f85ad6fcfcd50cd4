"""The scheduler's socket may be full at any message."""

import pytest

from loraplex.engine.frontend import requests as frontend_requests
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.messages.frontend import AbortRequests
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, FrontendHarness


@pytest.mark.parametrize("room", [0, 1, 2])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_request_that_has_no_room_fails_whole(codec: TextCodec, room: int, pooled: bool) -> None:
    harness = FrontendHarness(codec, max_model_len=1 << 20)
    harness.scheduler_room = room
    text = "x " * frontend_requests.POOL_PROMPT_CHARS if pooled else "x"
    harness.ask(A, prompt=text, sampling_params={"n": 3})
    if pooled:
        harness.run_pooled()
    (error,) = harness.take()
    assert (error["request_id"], error["code"]) == ("r", "queue_full")
    sent = [m.request_id for m in harness.take_sent(AddRequest)]
    assert len(sent) == room
    for sequence_id in sent:
        harness.output(sequence_id, [70])
    assert not harness.take(), "outputs came after the error"
    assert harness.frontend.needs_ticks, "the aborts would be lost"
    harness.scheduler_room = None
    harness.frontend.tick()
    aborted = [i for m in harness.take_sent(AbortRequests) for i in m.request_ids]
    assert set(sent) <= set(aborted)
    assert not harness.frontend.needs_ticks
    assert harness.stats["prompt_bytes"] == 0
    harness.ask(A, sampling_params={"n": 3})  # the id is free again
    assert len(harness.take_sent(AddRequest)) == 3


def test_an_abort_that_has_no_room_is_sent_later(codec: TextCodec) -> None:
    harness = FrontendHarness(codec)
    harness.ask(A, sampling_params={"stop": "two"})
    (added,) = harness.take_sent(AddRequest)
    harness.scheduler_room = 0
    harness.output(added.request_id, codec.tokenizer.encode("two", add_special_tokens=False))
    (reply,) = harness.take()
    assert reply["finished"]
    harness.frontend.tick()
    assert not harness.sent
    harness.scheduler_room = None
    harness.frontend.tick()
    (abort,) = harness.take_sent(AbortRequests)
    assert abort.request_ids.tolist() == [added.request_id]


def test_a_command_that_has_no_room_is_refused_and_forgotten(codec: TextCodec) -> None:
    harness = FrontendHarness(codec)
    harness.scheduler_room = 0
    for i in range(1100):  # more than may wait
        harness.ask(A, "list_adapters", request_id=str(i))
    assert {m["code"] for m in harness.take()} == {"queue_full"}
    harness.scheduler_room = None
    harness.ask(A, "list_adapters")
    assert not harness.replies
    assert len(harness.sent) == 1
