from array import array
from typing import Any

import pytest

from loraplex.engine.frontend.detokenizer import IncrementalDetokenizer
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.frontend.outputs import CompletionProcessor, OutputProcessor
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.tokenizer.tokenizer import Tokenizer
from loraplex.scheduler.frontend_protocol import SequenceOutput
from loraplex.scheduler.worker_protocol import TokenLogprobs


@pytest.fixture
def tokenizer(codec: TextCodec) -> Tokenizer:
    return codec.tokenizer


def make_outputs(
    tokenizer: Tokenizer | None, *, final_only: bool = False, echo: bool = False, **params: Any
) -> OutputProcessor:
    sampling = SamplingParams(**params)

    def detokenizer() -> IncrementalDetokenizer | None:
        if tokenizer is None or not sampling.detokenize:
            return None
        return IncrementalDetokenizer(
            tokenizer,
            [],
            stop=sampling.stop_strings,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )

    def decode(token_id: int) -> str:
        return f"<{token_id}>"

    return OutputProcessor(
        "a",
        [
            CompletionProcessor(
                i, sampling, detokenizer=detokenizer(), decode_token=decode, final_only=final_only
            )
            for i in range(sampling.n)
        ],
        prompt_token_ids=array("i", [8, 9]),
        echo_prompt=echo,
        final_only=final_only,
        decode_token=decode,
        scores_prompt=sampling.prompt_logprobs is not None,
    )


def output(token_ids: list[int], **values: Any) -> SequenceOutput:
    return SequenceOutput(1, array("i", token_ids), **values)


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def run(outputs: OutputProcessor, tokens: list[int], **last: Any) -> list[dict[str, Any]]:
    """Feed token by token; `last` goes with the last one. Returns the replies."""
    replies = []
    for i, token in enumerate(tokens):
        values = last if i == len(tokens) - 1 else {}
        if outputs.finished:
            break
        outputs.update(0, output([token], **values))
        reply = outputs.take_reply()
        if reply is not None:
            replies.append(reply)
    return replies


def text_of(replies: list[dict[str, Any]]) -> str:
    return "".join(entry["text"] for reply in replies for entry in reply["outputs"])


TEXT = "the déjà vu — 日本 🚀 end"


def test_streamed_pieces_join_to_the_whole_text(tokenizer: Tokenizer) -> None:
    tokens = plain(tokenizer, TEXT)
    replies = run(make_outputs(tokenizer), tokens, finish_reason="length")
    assert len(replies) == len(tokens)
    assert [r["outputs"][0]["token_ids"] for r in replies] == [[t] for t in tokens]
    assert text_of(replies) == TEXT
    assert "\ufffd" not in text_of(replies)
    assert [r["finished"] for r in replies] == [False] * (len(tokens) - 1) + [True]
    assert replies[-1]["outputs"][0]["finish_reason"] == "length"
    assert replies[-1]["usage"] == {
        "prompt_tokens": 2, "completion_tokens": len(tokens), "cached_tokens": 0,
    }  # fmt: skip
    assert "usage" not in replies[0]


@pytest.mark.parametrize("stop", [[], ["never"]])
def test_without_streaming_there_is_one_reply(tokenizer: Tokenizer, stop: list[str]) -> None:
    tokens = plain(tokenizer, TEXT)
    outputs = make_outputs(tokenizer, final_only=True, stop=stop)
    (reply,) = run(outputs, tokens, finish_reason="length", num_cached_tokens=1)
    assert reply["outputs"][0]["token_ids"] == tokens
    assert reply["outputs"][0]["text"] == TEXT
    assert reply["usage"]["cached_tokens"] == 1


@pytest.mark.parametrize("final_only", [False, True])
@pytest.mark.parametrize(("include", "expected"), [(False, "one tw"), (True, "one two th")])
def test_a_stop_string_ends_the_text_and_tells_the_scheduler(
    tokenizer: Tokenizer, final_only: bool, include: bool, expected: str
) -> None:
    tokens = plain(tokenizer, "one two three four")
    outputs = make_outputs(
        tokenizer, final_only=final_only, stop=["zzz", "o th"], include_stop_str_in_output=include
    )
    told, replies = [], []
    for token in tokens:
        told.append(outputs.update(0, output([token])))
        replies += [reply] if (reply := outputs.take_reply()) else []
        if outputs.finished:
            break
    assert told == [False] * (len(told) - 1) + [True]
    assert text_of(replies) == expected
    last = replies[-1]["outputs"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "o th")
    assert replies[-1]["usage"]["completion_tokens"] == len(told)
    assert outputs.take_reply() is None


def test_text_that_looked_like_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = plain(tokenizer, "one tw")
    replies = run(make_outputs(tokenizer, stop=["two"]), tokens, finish_reason="length")
    assert text_of(replies) == "one tw"
    assert replies[-1]["outputs"][0]["stop_reason"] is None


def test_a_stop_string_in_the_last_token_needs_no_abort(tokenizer: Tokenizer) -> None:
    outputs = make_outputs(tokenizer, stop=["two"])
    told = outputs.update(0, output(plain(tokenizer, "one two"), finish_reason="length"))
    assert told is False
    assert outputs.completions[0].stop_reason == "two"


@pytest.mark.parametrize(
    ("params", "token_id", "shown", "reason"),
    [
        ({}, 2, "", None),  # end of sequence
        ({"stop_token_ids": [70]}, 70, "", 70),
        ({"stop_token_ids": [70], "include_stop_str_in_output": True}, 70, "TOKEN", 70),
    ],
)
def test_a_stop_token_is_in_the_ids_and_not_in_the_text(
    tokenizer: Tokenizer, params: dict[str, Any], token_id: int, shown: str, reason: int | None
) -> None:
    tokens = [*plain(tokenizer, "one"), token_id]
    for final_only in (False, True):
        replies = run(
            make_outputs(tokenizer, final_only=final_only, **params), tokens,
            finish_reason="stop", stop_token_id=token_id,
        )  # fmt: skip
        last = replies[-1]["outputs"][0]
        assert last["token_ids"][-1] == token_id
        assert text_of(replies) == "one" + shown.replace("TOKEN", tokenizer.decode([token_id]))
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", reason)


def test_no_text_without_a_tokenizer_or_where_none_is_wanted(tokenizer: Tokenizer) -> None:
    for outputs in (make_outputs(None), make_outputs(tokenizer, detokenize=False)):
        replies = run(outputs, [70, 71], finish_reason="length")
        assert text_of(replies) == ""
        assert replies[0]["outputs"][0]["token_ids"] == [70]


def test_a_step_that_brings_several_tokens(tokenizer: Tokenizer) -> None:
    outputs = make_outputs(tokenizer)
    outputs.update(0, output(plain(tokenizer, "one two"), finish_reason="length"))
    reply = outputs.take_reply()
    assert reply is not None
    assert reply["outputs"][0]["text"] == "one two"


def test_logprobs_follow_their_tokens(tokenizer: Tokenizer) -> None:
    entry = TokenLogprobs(array("i", [70, 5]), array("f", [-0.5, -1.0]), array("i", [1, 2]))
    outputs = make_outputs(tokenizer, logprobs=1, prompt_logprobs=0)
    judged = TokenLogprobs(array("i", [9]), array("f", [-2.0]), array("i", [3]))
    outputs.update(0, output([], prompt_logprobs=[judged]))
    assert outputs.take_reply() is None  # nothing to say until the first token
    outputs.update(0, output([70], logprobs=[entry]))
    reply = outputs.take_reply()
    assert reply is not None
    assert reply["outputs"][0]["logprobs"] == [[[70, -0.5, 1, "<70>"], [5, -1.0, 2, "<5>"]]]
    assert reply["prompt_logprobs"] == [None, [[9, -2.0, 3, "<9>"]]]
    outputs.update(0, output([71], logprobs=[entry], finish_reason="length"))
    reply = outputs.take_reply()
    assert reply is not None
    assert len(reply["outputs"][0]["logprobs"]) == 1
    assert "prompt_logprobs" not in reply


def test_logprobs_of_a_prompt_of_one_token(tokenizer: Tokenizer) -> None:
    outputs = make_outputs(tokenizer, prompt_logprobs=1)
    outputs.update(0, output([70]))
    reply = outputs.take_reply()
    assert reply is not None and reply["prompt_logprobs"] == [None]


def test_prompt_logprobs_are_in_the_first_message_and_complete(tokenizer: Tokenizer) -> None:
    """Another completion may have tokens before the one that scores the prompt."""
    entry = TokenLogprobs(array("i", [9]), array("f", [-2.0]), array("i", [3]))
    outputs = make_outputs(tokenizer, n=2, prompt_logprobs=0)
    outputs.update(1, output([70]))
    assert outputs.take_reply() is None
    outputs.update(0, output([], prompt_logprobs=[entry]))
    outputs.update(1, output([71]))
    assert outputs.take_reply() is None
    outputs.update(0, output([72]))
    reply = outputs.take_reply()
    assert reply is not None
    assert reply["prompt_logprobs"] == [None, [[9, -2.0, 3, "<9>"]]]
    assert [entry["token_ids"] for entry in reply["outputs"]] == [[72], [70, 71]]
    outputs.update(1, output([73], finish_reason="length"))
    reply = outputs.take_reply()
    assert reply is not None and "prompt_logprobs" not in reply


def test_an_abort_does_not_wait_for_prompt_logprobs(tokenizer: Tokenizer) -> None:
    outputs = make_outputs(tokenizer, n=2, prompt_logprobs=0)
    outputs.update(1, output([70]))
    for completion in outputs.completions:
        completion.abort()
    reply = outputs.take_reply()
    assert reply is not None and reply["finished"]


def test_several_answers_end_one_by_one_and_each_once(tokenizer: Tokenizer) -> None:
    outputs = make_outputs(tokenizer, n=3, echo=True)
    outputs.update(1, output([70], finish_reason="length"))
    outputs.update(0, output([71]))
    reply = outputs.take_reply()
    assert reply is not None
    assert [entry["index"] for entry in reply["outputs"]] == [0, 1]
    assert reply["prompt_token_ids"] == [8, 9]
    assert reply["finished"] is False
    outputs.update(0, output([72], finish_reason="stop", stop_token_id=72))
    reply = outputs.take_reply()
    assert reply is not None
    assert [entry["index"] for entry in reply["outputs"]] == [0]  # 1 is not told again
    assert "prompt_token_ids" not in reply
    outputs.update(2, output([73], finish_reason="length"))
    reply = outputs.take_reply()
    assert reply is not None
    assert reply["finished"] is True
    assert reply["usage"]["completion_tokens"] == 4


def test_n_answers_without_streaming_come_together(tokenizer: Tokenizer) -> None:
    outputs = make_outputs(tokenizer, n=2, final_only=True)
    outputs.update(1, output([70], finish_reason="length"))
    assert outputs.take_reply() is None
    outputs.update(0, output([71], finish_reason="length"))
    reply = outputs.take_reply()
    assert reply is not None
    assert [entry["index"] for entry in reply["outputs"]] == [0, 1]


@pytest.mark.parametrize("final_only", [False, True])
def test_an_abort_lets_go_what_was_held_back(tokenizer: Tokenizer, final_only: bool) -> None:
    outputs = make_outputs(tokenizer, final_only=final_only, stop=["two"])
    replies = run(outputs, plain(tokenizer, "one tw"))
    outputs.completions[0].abort()
    last = outputs.take_reply()
    assert last is not None
    assert text_of([*replies, last]) == "one tw"
    assert last["outputs"][0]["finish_reason"] == "abort"
    assert last["finished"] is True
