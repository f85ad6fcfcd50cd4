from array import array
from typing import Any

import pytest

from loraplex.engine.config import ServerConfig
from loraplex.engine.frontend import requests as frontend_requests
from loraplex.engine.frontend.clients import PROBE_INTERVAL_S
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.messages.frontend import AbortRequests
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, B, FrontendHarness


@pytest.fixture
def harness(codec: TextCodec) -> FrontendHarness:
    return FrontendHarness(codec)


def test_a_request_reaches_the_scheduler_and_its_tokens_the_client(
    harness: FrontendHarness,
) -> None:
    harness.ask(A, adapter="pirate", salt="s", priority=3, return_prompt_token_ids=True)
    (added,) = harness.take_sent(AddRequest)
    assert added.prompt_token_ids == array("i", [5, 6, 7])
    assert (added.adapter, added.salt, added.priority) == ("pirate", "s", 3)
    harness.output(added.request_id, [70])
    harness.output(added.request_id, [71], finish_reason="length", num_cached_tokens=2)
    first, last = harness.take(A)
    assert first["request_id"] == "r"
    assert first["prompt_token_ids"] == [5, 6, 7]
    assert (first["finished"], last["finished"]) == (False, True)
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 2}
    assert harness.stats["finished"] == 1
    assert not harness.frontend.needs_ticks


def test_clients_do_not_see_each_others_requests(harness: FrontendHarness) -> None:
    harness.ask(A)
    harness.ask(B)
    a, b = harness.take_sent(AddRequest)
    assert a.request_id != b.request_id
    harness.ask(B, "cancel")
    assert harness.take_sent(AbortRequests)[0].request_ids.tolist() == [b.request_id]
    harness.output(a.request_id, [70])
    assert [c for c, _ in harness.replies] == [B, A]


def test_an_id_may_be_used_again_only_after_its_end(harness: FrontendHarness) -> None:
    harness.ask(A)
    (added,) = harness.take_sent(AddRequest)
    harness.ask(A)
    assert harness.take()[0]["code"] == "duplicate_request"
    assert not harness.sent
    harness.output(added.request_id, [70], finish_reason="length")
    harness.take()
    harness.ask(A)
    assert len(harness.take_sent(AddRequest)) == 1
    assert not harness.take()


def test_requests_of_one_client_are_limited(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, server=ServerConfig(max_requests_per_client=2))
    for i in range(3):
        harness.ask(A, request_id=f"r{i}")
    assert len(harness.take_sent(AddRequest)) == 2
    (error,) = harness.take()
    assert (error["code"], error["request_id"]) == ("too_many_requests", "r2")
    harness.ask(B)
    assert len(harness.take_sent(AddRequest)) == 1


def test_what_is_wrong_with_a_request_is_told_under_its_id(harness: FrontendHarness) -> None:
    for values, code in [
        ({"prompt_token_ids": []}, "bad_request"),
        ({"prompt_token_ids": [999]}, "bad_request"),
        ({"prompt_token_ids": [5] * 64}, "prompt_too_long"),
        ({"sampling_params": {"logit_bias": {999: 1.0}}}, "bad_request"),
        ({"sampling_params": {"n": 0}}, "bad_request"),
        ({"nonsense": 1}, "bad_request"),
    ]:
        harness.ask(A, **values)
        (error,) = harness.take()
        assert (error["type"], error["request_id"], error["code"]) == ("error", "r", code)
        assert "Traceback" not in error["message"]
    assert not harness.sent
    assert not harness.frontend.needs_ticks


def test_a_stop_string_ends_the_request_here_and_there(
    harness: FrontendHarness, codec: TextCodec
) -> None:
    harness.ask(A, sampling_params={"stop": "two"})
    (added,) = harness.take_sent(AddRequest)
    harness.output(added.request_id, codec.tokenizer.encode("one two", add_special_tokens=False))
    (reply,) = harness.take()
    assert reply["outputs"][0]["text"] == "one "
    assert reply["outputs"][0]["stop_reason"] == "two"
    assert reply["finished"]
    assert harness.take_sent(AbortRequests)[0].request_ids.tolist() == [added.request_id]
    harness.output(added.request_id, [70])  # was under way
    assert not harness.take()


def test_one_stop_string_does_not_end_the_other_answers(
    harness: FrontendHarness, codec: TextCodec
) -> None:
    harness.ask(A, sampling_params={"stop": "two", "n": 2})
    first, second = harness.take_sent(AddRequest)
    assert first.sampling.seed != second.sampling.seed
    harness.output(first.request_id, codec.tokenizer.encode("two", add_special_tokens=False))
    assert not harness.take()[0]["finished"]
    assert harness.take_sent(AbortRequests)[0].request_ids.tolist() == [first.request_id]
    harness.output(second.request_id, [70], finish_reason="length")
    (reply,) = harness.take()
    assert reply["finished"]
    assert [entry["index"] for entry in reply["outputs"]] == [1]


def test_an_error_of_one_answer_fails_the_request_once(harness: FrontendHarness) -> None:
    harness.ask(A, sampling_params={"n": 3})
    ids = [added.request_id for added in harness.take_sent(AddRequest)]
    for sequence_id in ids:
        harness.output(
            sequence_id, [], finish_reason="error", error="no such adapter",
            error_code="unknown_adapter",
        )  # fmt: skip
    (error,) = harness.take()
    assert (error["code"], error["message"]) == ("unknown_adapter", "no such adapter")
    assert harness.take_sent(AbortRequests)[0].request_ids.tolist() == ids
    assert harness.stats["failed"] == 1


@pytest.mark.parametrize(
    "values",
    [{"stream": False}, {"sampling_params": {"output_kind": "final_only", "max_tokens": 4}}],
)
def test_a_final_only_request_gets_one_message(
    harness: FrontendHarness, values: dict[str, Any]
) -> None:
    harness.ask(A, **values)
    (added,) = harness.take_sent(AddRequest)
    for token_id in (70, 71, 72):
        harness.output(added.request_id, [token_id])
    assert not harness.take()
    harness.output(added.request_id, [73], finish_reason="length")
    (reply,) = harness.take()
    assert reply["outputs"][0]["token_ids"] == [70, 71, 72, 73]
    assert reply["finished"]


@pytest.mark.parametrize("kind", ["cumulative", "delta"])
def test_messages_of_a_stream_hold_only_what_is_new(harness: FrontendHarness, kind: str) -> None:
    harness.ask(A, sampling_params={"output_kind": kind})
    (added,) = harness.take_sent(AddRequest)
    for token_id in (70, 71, 72):
        harness.output(added.request_id, [token_id])
        (reply,) = harness.take()
        assert reply["outputs"][0]["token_ids"] == [token_id]


def test_cancel_sends_what_there_is_and_ends(harness: FrontendHarness) -> None:
    harness.ask(A, stream=False)
    (added,) = harness.take_sent(AddRequest)
    harness.output(added.request_id, [70, 71])
    harness.ask(A, "cancel")
    (reply,) = harness.take()
    assert reply["outputs"][0]["token_ids"] == [70, 71]
    assert reply["outputs"][0]["finish_reason"] == "abort"
    assert reply["finished"]
    assert harness.take_sent(AbortRequests)[0].request_ids.tolist() == [added.request_id]
    harness.ask(A, "cancel")  # again, or of something unknown: nothing
    harness.ask(B, "cancel")
    assert not harness.take()
    assert not harness.sent


def test_bye_cancels_without_a_word(harness: FrontendHarness) -> None:
    harness.ask(A, request_id="r1")
    harness.ask(A, request_id="r2")
    ids = [added.request_id for added in harness.take_sent(AddRequest)]
    harness.frontend.on_message(A, {"type": "bye"})
    aborted = [i for m in harness.take_sent(AbortRequests) for i in m.request_ids]
    assert aborted == ids
    assert not harness.take()
    assert not harness.frontend.needs_ticks


def test_a_client_found_gone_at_an_output_loses_all_its_requests(harness: FrontendHarness) -> None:
    harness.ask(A, request_id="r1")
    harness.ask(A, request_id="r2")
    harness.ask(B)
    r1, r2, _ = (added.request_id for added in harness.take_sent(AddRequest))
    harness.gone.add(A)
    harness.output(r1, [70])
    aborted = [i for m in harness.take_sent(AbortRequests) for i in m.request_ids]
    assert sorted(aborted) == [r1, r2]
    harness.output(r2, [70])
    assert not harness.take(A)
    assert harness.stats["lost_clients"] == 1
    assert harness.stats["waiting_clients"] == 1


def test_a_silent_wait_is_probed(harness: FrontendHarness) -> None:
    harness.ask(A, stream=False)
    (added,) = harness.take_sent(AddRequest)
    harness.frontend.tick()
    assert not harness.take()  # not yet
    harness.now_s += PROBE_INTERVAL_S + 0.1
    harness.frontend.tick()
    assert harness.take(A) == [{"type": "ping"}]
    harness.frontend.tick()
    assert not harness.take()
    harness.now_s += PROBE_INTERVAL_S + 0.1
    harness.gone.add(A)
    harness.frontend.tick()
    assert harness.take_sent(AbortRequests)[0].request_ids.tolist() == [added.request_id]
    assert not harness.frontend.needs_ticks


def test_replies_wait_for_a_client_that_reads_slowly(harness: FrontendHarness) -> None:
    harness.ask(A)
    (added,) = harness.take_sent(AddRequest)
    harness.slow.add(A)
    for token_id in (70, 71):
        harness.output(added.request_id, [token_id])
    assert harness.stats["unread_bytes"] > 0
    harness.slow.clear()
    harness.output(added.request_id, [72], finish_reason="length")
    assert not harness.replies
    due_s = harness.frontend.flush_due_s
    assert due_s is not None
    harness.now_s += due_s
    harness.frontend.run_ready()
    assert [m["outputs"][0]["token_ids"] for m in harness.take(A)] == [[70], [71], [72]]
    assert harness.frontend.flush_due_s is None
    assert harness.stats["unread_bytes"] == 0
    assert harness.stats["slow_clients"] == 0
    assert not harness.frontend.needs_ticks


def test_a_client_that_does_not_read_is_cut_off_and_told_later(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, server=ServerConfig(max_client_backlog=2))
    harness.ask(A, request_id="r1")
    harness.ask(A, request_id="r2")
    r1, r2 = (added.request_id for added in harness.take_sent(AddRequest))
    harness.slow.add(A)
    for token_id in (70, 71, 72):
        assert not harness.sent
        harness.output(r1, [token_id])
    aborted = [i for m in harness.take_sent(AbortRequests) for i in m.request_ids]
    assert sorted(aborted) == [r1, r2]
    assert harness.frontend.needs_ticks
    harness.now_s += 1.0
    harness.frontend.run_ready()
    assert not harness.replies
    harness.slow.clear()
    harness.now_s += 1.0
    harness.frontend.run_ready()
    told = harness.take(A)
    assert [(m["code"], m["request_id"]) for m in told] == [
        ("slow_client", "r1"), ("slow_client", "r2"),
    ]  # fmt: skip
    assert not harness.frontend.needs_ticks
    assert harness.stats["slow_clients"] == 1


LONG_TEXT = "x " * frontend_requests.POOL_PROMPT_CHARS


def test_long_prompts_are_tokenized_aside(harness: FrontendHarness) -> None:
    harness.ask(A, prompt=LONG_TEXT)
    assert not harness.take()
    harness.run_pooled()
    (error,) = harness.take()
    assert error["code"] == "prompt_too_long"


def test_a_long_prompt_can_be_cancelled_while_it_is_tokenized(harness: FrontendHarness) -> None:
    harness.ask(A, prompt=LONG_TEXT, sampling_params={"n": 2})
    harness.ask(A, "cancel")
    (reply,) = harness.take()
    assert reply["finished"]
    assert [e["finish_reason"] for e in reply["outputs"]] == ["abort", "abort"]
    harness.run_pooled()
    assert not harness.take()
    assert not harness.sent


def test_long_prompts_that_wait_are_limited(harness: FrontendHarness) -> None:
    text = "x" * (frontend_requests.MAX_CLIENT_CHARS * 2 // 3)
    for client, request_id in [(A, "r1"), (A, "r2"), (B, "r3"), (b"c", "r4"), (b"d", "r5")]:
        harness.ask(client, prompt=text, request_id=request_id)
    refused = [m["request_id"] for m in harness.take() if m["code"] == "queue_full"]
    assert refused == ["r2", "r5"]
    for _ in range(3):
        harness.run_pooled()
        if len(harness.replies) == 3:
            break
    assert {m["code"] for m in harness.take()} == {"prompt_too_long"}
    harness.ask(A, prompt=text, request_id="r2")
    assert not harness.take()


def test_death_is_told_to_all_who_wait_and_all_who_come(harness: FrontendHarness) -> None:
    harness.ask(A, request_id="r1")
    harness.ask(B, "stats", request_id="q")
    harness.frontend.fail_all("worker 0 was killed by signal 9 (SIGKILL)")
    told = [(c, m["request_id"], m["code"]) for c, m in harness.replies]
    assert told == [(A, "r1", "engine_dead"), (B, "q", "engine_dead")]
    harness.take()
    harness.ask(B, request_id="r2")
    (error,) = harness.take()
    assert (error["code"], error["request_id"]) == ("engine_dead", "r2")
    assert "signal 9" in error["message"]
    harness.ask(B, "health")
    assert harness.take()[0]["status"] == "dead"
