import time
from array import array
from collections.abc import Callable

import pytest

from loraplex.engine.config import ServerConfig
from loraplex.engine.frontend import clients as frontend_clients
from loraplex.engine.frontend import requests as frontend_requests
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.messages import AbortRequests, AddRequest

from helpers.fakes.frontend_desk import A, B, Desk, make_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return make_codec(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def desk(codec: TextCodec) -> Desk:
    return Desk(codec)


def test_a_request_reaches_the_scheduler_and_its_tokens_the_client(desk: Desk) -> None:
    desk.ask(A, adapter="pirate", salt="s", priority=3, return_prompt_token_ids=True)
    (added,) = desk.take_sent(AddRequest)
    assert added.prompt_token_ids == array("i", [5, 6, 7])
    assert (added.adapter, added.salt, added.priority) == ("pirate", "s", 3)
    desk.output(added.request_id, [70])
    desk.output(added.request_id, [71], finish_reason="length", num_cached_tokens=2)
    first, last = desk.take(A)
    assert first["request_id"] == "r"
    assert first["prompt_token_ids"] == [5, 6, 7]
    assert (first["finished"], last["finished"]) == (False, True)
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 2}
    assert desk.stats["finished"] == 1
    assert not desk.frontend.needs_ticks


def test_clients_do_not_see_each_others_requests(desk: Desk) -> None:
    desk.ask(A)
    desk.ask(B)
    a, b = desk.take_sent(AddRequest)
    assert a.request_id != b.request_id
    desk.ask(B, "cancel")
    assert desk.take_sent(AbortRequests)[0].request_ids.tolist() == [b.request_id]
    desk.output(a.request_id, [70])
    assert [c for c, _ in desk.replies] == [B, A]


def test_an_id_may_be_used_again_only_after_its_end(desk: Desk) -> None:
    desk.ask(A)
    (added,) = desk.take_sent(AddRequest)
    desk.ask(A)
    assert desk.take()[0]["code"] == "duplicate_request"
    assert not desk.sent
    desk.output(added.request_id, [70], finish_reason="length")
    desk.take()
    desk.ask(A)
    assert len(desk.take_sent(AddRequest)) == 1
    assert not desk.take()


def test_requests_of_one_client_are_limited(codec: TextCodec) -> None:
    desk = Desk(codec, server=ServerConfig(max_requests_per_client=2))
    for i in range(3):
        desk.ask(A, request_id=f"r{i}")
    assert len(desk.take_sent(AddRequest)) == 2
    (error,) = desk.take()
    assert (error["code"], error["request_id"]) == ("too_many_requests", "r2")
    desk.ask(B)
    assert len(desk.take_sent(AddRequest)) == 1


def test_what_is_wrong_with_a_request_is_told_under_its_id(desk: Desk) -> None:
    for values, code in [
        ({"prompt_token_ids": []}, "bad_request"),
        ({"prompt_token_ids": [999]}, "bad_request"),
        ({"prompt_token_ids": [5] * 64}, "prompt_too_long"),
        ({"sampling_params": {"logit_bias": {999: 1.0}}}, "bad_request"),
        ({"sampling_params": {"n": 0}}, "bad_request"),
        ({"nonsense": 1}, "bad_request"),
    ]:
        desk.ask(A, **values)
        (error,) = desk.take()
        assert (error["type"], error["request_id"], error["code"]) == ("error", "r", code)
        assert "Traceback" not in error["message"]
    assert not desk.sent
    assert not desk.frontend.needs_ticks


def test_a_stop_string_ends_the_request_here_and_there(desk: Desk, codec: TextCodec) -> None:
    desk.ask(A, sampling_params={"stop": "two"})
    (added,) = desk.take_sent(AddRequest)
    desk.output(added.request_id, codec.tokenizer.encode("one two", add_special_tokens=False))
    (reply,) = desk.take()
    assert reply["outputs"][0]["text"] == "one "
    assert reply["outputs"][0]["stop_reason"] == "two"
    assert reply["finished"]
    assert desk.take_sent(AbortRequests)[0].request_ids.tolist() == [added.request_id]
    desk.output(added.request_id, [70])  # was under way
    assert not desk.take()


def test_one_stop_string_does_not_end_the_other_answers(desk: Desk, codec: TextCodec) -> None:
    desk.ask(A, sampling_params={"stop": "two", "n": 2})
    first, second = desk.take_sent(AddRequest)
    assert first.sampling.seed != second.sampling.seed
    desk.output(first.request_id, codec.tokenizer.encode("two", add_special_tokens=False))
    assert not desk.take()[0]["finished"]
    assert desk.take_sent(AbortRequests)[0].request_ids.tolist() == [first.request_id]
    desk.output(second.request_id, [70], finish_reason="length")
    (reply,) = desk.take()
    assert reply["finished"]
    assert [entry["index"] for entry in reply["outputs"]] == [1]


def test_an_error_of_one_answer_fails_the_request_once(desk: Desk) -> None:
    desk.ask(A, sampling_params={"n": 3})
    ids = [added.request_id for added in desk.take_sent(AddRequest)]
    for sequence_id in ids:
        desk.output(
            sequence_id, [], finish_reason="error", error="no such adapter",
            error_code="unknown_adapter",
        )  # fmt: skip
    (error,) = desk.take()
    assert (error["code"], error["message"]) == ("unknown_adapter", "no such adapter")
    assert desk.take_sent(AbortRequests)[0].request_ids.tolist() == ids
    assert desk.stats["failed"] == 1


def test_cancel_sends_what_there_is_and_ends(desk: Desk) -> None:
    desk.ask(A, stream=False)
    (added,) = desk.take_sent(AddRequest)
    desk.output(added.request_id, [70, 71])
    desk.ask(A, "cancel")
    (reply,) = desk.take()
    assert reply["outputs"][0]["token_ids"] == [70, 71]
    assert reply["outputs"][0]["finish_reason"] == "abort"
    assert reply["finished"]
    assert desk.take_sent(AbortRequests)[0].request_ids.tolist() == [added.request_id]
    desk.ask(A, "cancel")  # again, or of something unknown: nothing
    desk.ask(B, "cancel")
    assert not desk.take()
    assert not desk.sent


def test_bye_cancels_without_a_word(desk: Desk) -> None:
    desk.ask(A, request_id="r1")
    desk.ask(A, request_id="r2")
    ids = [added.request_id for added in desk.take_sent(AddRequest)]
    desk.frontend.on_message(A, {"type": "bye"})
    aborted = [i for m in desk.take_sent(AbortRequests) for i in m.request_ids]
    assert aborted == ids
    assert not desk.take()
    assert not desk.frontend.needs_ticks


def test_a_client_found_gone_at_an_output_loses_all_its_requests(desk: Desk) -> None:
    desk.ask(A, request_id="r1")
    desk.ask(A, request_id="r2")
    desk.ask(B)
    r1, r2, _ = (added.request_id for added in desk.take_sent(AddRequest))
    desk.gone.add(A)
    desk.output(r1, [70])
    aborted = [i for m in desk.take_sent(AbortRequests) for i in m.request_ids]
    assert sorted(aborted) == [r1, r2]
    desk.output(r2, [70])
    assert not desk.take(A)
    assert desk.stats["lost_clients"] == 1
    assert desk.stats["waiting_clients"] == 1


def test_a_silent_wait_is_probed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_clients, "PROBE_INTERVAL_S", 0.05)
    desk.ask(A, stream=False)
    (added,) = desk.take_sent(AddRequest)
    desk.frontend.tick()
    assert not desk.take()  # not yet
    time.sleep(0.06)
    desk.frontend.tick()
    assert desk.take(A) == [{"type": "ping"}]
    desk.frontend.tick()
    assert not desk.take()
    time.sleep(0.06)
    desk.gone.add(A)
    desk.frontend.tick()
    assert desk.take_sent(AbortRequests)[0].request_ids.tolist() == [added.request_id]
    assert not desk.frontend.needs_ticks


def test_a_client_that_does_not_read_is_cut_off_and_told_later(desk: Desk) -> None:
    desk.ask(A, request_id="r1")
    desk.ask(A, request_id="r2")
    r1, r2 = (added.request_id for added in desk.take_sent(AddRequest))
    desk.slow.add(A)
    desk.output(r1, [70])
    aborted = [i for m in desk.take_sent(AbortRequests) for i in m.request_ids]
    assert sorted(aborted) == [r1, r2]
    assert desk.frontend.needs_ticks
    desk.frontend.tick()
    assert not desk.replies
    desk.slow.clear()
    desk.frontend.tick()
    told = desk.take(A)
    assert [(m["code"], m["request_id"]) for m in told] == [
        ("slow_client", "r1"), ("slow_client", "r2"),
    ]  # fmt: skip
    assert not desk.frontend.needs_ticks
    assert desk.stats["slow_clients"] == 1


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def long_text(desk: Desk) -> str:
    return "x " * frontend_requests.POOL_PROMPT_CHARS


def test_long_prompts_are_tokenized_aside(desk: Desk) -> None:
    desk.ask(A, prompt=long_text(desk))
    assert not desk.take()
    wait_for(lambda: desk.frontend._requests._tokenized)
    desk.frontend.run_ready()
    (error,) = desk.take()
    assert error["code"] == "prompt_too_long"


def test_a_long_prompt_can_be_cancelled_while_it_is_tokenized(desk: Desk) -> None:
    desk.ask(A, prompt=long_text(desk), sampling_params={"n": 2})
    desk.ask(A, "cancel")
    (reply,) = desk.take()
    assert reply["finished"]
    assert [e["finish_reason"] for e in reply["outputs"]] == ["abort", "abort"]
    wait_for(lambda: desk.frontend._requests._tokenized)
    desk.frontend.run_ready()
    assert not desk.take()
    assert not desk.sent


def test_long_prompts_that_wait_are_limited(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    text = long_text(desk)
    monkeypatch.setattr(frontend_requests, "MAX_POOLED_CHARS", 2 * len(text))
    for i in range(3):
        desk.ask(A, prompt=text, request_id=f"r{i}")
    (error,) = desk.take()
    assert (error["code"], error["request_id"]) == ("queue_full", "r2")
    wait_for(lambda: len(desk.frontend._requests._tokenized) == 2)
    desk.frontend.run_ready()
    desk.take()
    desk.ask(A, prompt=text, request_id="r2")
    assert not desk.take()


def test_death_is_told_to_all_who_wait_and_all_who_come(desk: Desk) -> None:
    desk.ask(A, request_id="r1")
    desk.ask(B, "stats", request_id="q")
    desk.frontend.fail_all("worker 0 was killed by signal 9 (SIGKILL)")
    told = [(c, m["request_id"], m["code"]) for c, m in desk.replies]
    assert told == [(A, "r1", "engine_dead"), (B, "q", "engine_dead")]
    desk.take()
    desk.ask(B, request_id="r2")
    (error,) = desk.take()
    assert (error["code"], error["request_id"]) == ("engine_dead", "r2")
    assert "signal 9" in error["message"]
    desk.ask(B, "health")
    assert desk.take()[0]["status"] == "dead"
