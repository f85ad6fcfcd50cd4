"""One message must not hold up the other clients: what it may cost is bounded and counted."""

import tracemalloc
from array import array
from typing import Any

import msgpack
import pytest

from loraplex.engine.errors import ClientError
from loraplex.engine.frontend import protocol, requests, sampling_params
from loraplex.engine.frontend.bounded_msgpack import MAX_ELEMENTS
from loraplex.engine.frontend.field_checks import short
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.scheduler.frontend_protocol import AddRequest
from loraplex.scheduler.worker_protocol import TokenLogprobs

from helpers.fakes.frontend_harness import A, B, FrontendHarness

MANY = 1 << 21


@pytest.fixture
def harness(codec: TextCodec) -> FrontendHarness:
    return FrontendHarness(codec)


def array_of(count: int, element: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + element * count


@pytest.mark.parametrize(
    "frame",
    [
        b"\x81\xa1a" + array_of(MANY, b"\x90"),
        b"\x81\xa1a" + array_of(MANY, b"\x80"),
        b"\x81\xa1a" + array_of(64, array_of(MANY // 64, b"\xc0")),
        array_of(1000, array_of(1000, b"\x91\x00")),
    ],
    ids=["lists", "maps", "nested", "deeper"],
)
def test_a_message_of_many_elements_is_given_up_before_it_is_built(frame: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ClientError, match=str(MAX_ELEMENTS)) as caught:
            protocol.decode_frame(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code == "too_large"
    assert peak < 100 * MAX_ELEMENTS


def test_long_prompts_of_token_ids_still_fit() -> None:
    ids = list(range(200_000))
    frame = msgpack.packb({"type": "generate", "request_id": "a", "prompt_token_ids": ids})
    assert protocol.decode_frame(frame)["prompt_token_ids"] == ids


class Loud:
    """Counts how often it is written out."""

    times = 0

    def __repr__(self) -> str:
        Loud.times += 1
        return "loud"


def test_a_wrong_value_is_cut_before_it_is_written_out() -> None:
    Loud.times = 0
    assert short([Loud()] * 9) == "a list of 9 entries"
    assert short({i: Loud() for i in range(9)}) == "a dict of 9 entries"
    assert short("x" * MANY) == repr("x" * 40)
    for name in ("temperature", "n", "ignore_eos", "seed", "output_kind"):
        with pytest.raises((TypeError, ValueError), match="a list of 9 entries"):
            sampling_params.SamplingParams(**{name: [Loud()] * 9})
    with pytest.raises(ClientError, match="a list of 9 entries"):
        protocol.parse({"type": [Loud()] * 9})
    with pytest.raises(ClientError, match="a list of 9 entries"):
        protocol.parse({"type": "ping", "version": [Loud()] * 9})
    assert Loud.times == 0


@pytest.mark.parametrize(
    "values",
    [
        {"stop": ["ab"] * 129},
        {"stop": "a" * 4097},
        {"stop": ["a" * 2049] * 2},
        {"stop_token_ids": [1] * 4097},
        {"logit_bias": {i: 1.0 for i in range(4097)}},
        {"logit_bias": {str(i): 1.0 for i in range(4097)}},
        {"n": 256, "logprobs": 16},
    ],
)
def test_lists_of_sampling_params_are_limited(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at most|exceed"):
        sampling_params.SamplingParams.from_wire(values)


def test_a_text_longer_than_any_prompt_is_refused_before_it_is_tokenized(
    codec: TextCodec,
) -> None:
    class CountingTokenizer:
        seen = 0
        max_token_chars = codec.tokenizer.max_token_chars

        def __getattr__(self, name: str) -> Any:
            return getattr(codec.tokenizer, name)

        def encode(self, text: str, **options: Any) -> list[int]:
            self.seen += len(text)
            return codec.tokenizer.encode(text, **options)

    counting = CountingTokenizer()
    harness = FrontendHarness(TextCodec(counting, codec.chat_template))  # type: ignore[arg-type]
    longest = 64 * codec.tokenizer.max_token_chars
    harness.ask(A, prompt="a" * (longest + 1))
    harness.ask(B, messages=[{"role": "user", "content": "a" * (longest + 1)}])
    for reply in harness.take():
        assert reply["code"] == "prompt_too_long"
    assert counting.seen == 0


def test_every_text_and_entry_of_a_chat_counts(harness: FrontendHarness) -> None:
    chars = requests.POOL_PROMPT_CHARS + 1
    for message in (
        {"role": "u" * chars, "content": "x"},
        {"role": "user", "content": "x", "name": "n" * chars},
        {"role": "user", "content": "x", "more": [{"deep": "n" * chars}]},
        {"role": "user", "content": "x", "more": [None] * chars},
    ):
        harness.ask(A, messages=[message])
        assert not harness.replies, "rendered on the loop"
        assert not harness.sent, "rendered on the loop"
        harness.run_pooled()
        assert harness.take() or harness.take_sent(AddRequest)
        harness.ask(A, "cancel")
        harness.take()
        harness.sent.clear()


def test_a_chat_of_many_messages_is_refused_before_it_is_rendered(
    harness: FrontendHarness,
) -> None:
    harness.ask(A, messages=[{"role": "user", "content": ""}] * 30_000)
    (error,) = harness.take()
    assert error["code"] == "too_large"
    assert not harness.sent


def test_copies_and_logprobs_of_a_prompt_are_limited(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, max_model_len=40_000)
    for values in ({"n": 200}, {"prompt_logprobs": 5}):
        harness.ask(A, prompt_token_ids=[5] * 30_000, sampling_params=values)
        (error,) = harness.take()
        assert error["code"] == "bad_request"
        assert "30000" in error["message"]
    assert not harness.sent


def judged(num_tokens: int, num_entries: int) -> list[TokenLogprobs]:
    ids, ranks = array("i", range(num_entries)), array("i", range(num_entries))
    logprobs = array("f", [-1.0] * num_entries)
    return [TokenLogprobs(ids, logprobs, ranks) for _ in range(num_tokens)]


def test_prompt_logprobs_are_prepared_in_turns(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, max_model_len=1000)
    tokens = 300
    harness.ask(A, prompt_token_ids=[5] * (tokens + 1), sampling_params={"prompt_logprobs": 127})
    (added,) = harness.take_sent(AddRequest)
    harness.output(added.request_id, [70], prompt_logprobs=judged(tokens, 128))
    turns = 0
    while not harness.replies:
        harness.run_pooled()
        turns += 1
    assert turns >= tokens * 128 // requests.MAX_CONVERTED_A_TURN
    (reply,) = harness.take(A)
    assert len(reply["prompt_logprobs"]) == tokens + 1
    assert all(len(entries) == 128 for entries in reply["prompt_logprobs"][1:])
    assert reply["outputs"][0]["token_ids"] == [70]
    harness.output(added.request_id, [71], finish_reason="length")
    assert harness.take()[-1]["finished"]


def test_a_request_may_be_cancelled_while_its_logprobs_are_prepared(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, max_model_len=1000)
    harness.ask(A, prompt_token_ids=[5] * 301, sampling_params={"prompt_logprobs": 127})
    (added,) = harness.take_sent(AddRequest)
    harness.output(added.request_id, [70], prompt_logprobs=judged(300, 128))
    harness.ask(A, "cancel")
    (reply,) = harness.take(A)
    assert reply["finished"]
    assert reply["outputs"][0]["token_ids"] == [70]
    harness.run_pooled()
    assert not harness.replies


class PanicException(BaseException):
    """Like that of the tokenizers library, which is no Exception."""


@pytest.mark.parametrize("error", [PanicException("rust"), RecursionError(), MemoryError()])
def test_whatever_a_tokenizer_raises_fails_its_request_alone(
    codec: TextCodec, error: BaseException
) -> None:
    class PanickingTokenizer:
        max_token_chars = 1 << 20

        def __getattr__(self, name: str) -> Any:
            return getattr(codec.tokenizer, name)

        def encode(self, text: str, **options: Any) -> list[int]:
            raise error

    panicking = PanickingTokenizer()
    harness = FrontendHarness(TextCodec(panicking, codec.chat_template))  # type: ignore[arg-type]
    harness.ask(A, prompt="short")
    (reply,) = harness.take(A)
    assert (reply["type"], reply["request_id"]) == ("error", "r")
    harness.ask(A, prompt="x" * (requests.POOL_PROMPT_CHARS + 1))
    harness.run_pooled()
    (reply,) = harness.take(A)
    assert (reply["type"], reply["request_id"]) == ("error", "r")
