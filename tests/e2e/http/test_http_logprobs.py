"""Log-probabilities and echo, against those that ZeroMQ clients get."""

import math
from typing import Any

import openai
import pytest

from loraplex import RequestOutput, SamplingParams

from helpers.running.http_server import BASE, Served

pytestmark = pytest.mark.e2e
PROMPT = "The capital of"
CHAT = [{"role": "user", "content": "Hi"}]


def over_zmq(served: Served, prompt: Any, **params: Any) -> RequestOutput:
    with served.zmq() as client:
        *_, last = client.generate(prompt, SamplingParams(temperature=0, max_tokens=6, **params))
    return last


def values_of(positions: Any) -> list[dict[int, float]]:
    """Returns the log-probabilities by token id for each position of a ZeroMQ answer."""
    return [{i: entry.logprob for i, entry in (position or {}).items()} for position in positions]


def test_a_chats_logprobs(served: Served, api: openai.OpenAI) -> None:
    want = over_zmq(served, {"messages": CHAT}, logprobs=3)
    options: dict[str, Any] = {
        "model": BASE, "messages": CHAT, "temperature": 0, "max_tokens": 6, "logprobs": True,
        "top_logprobs": 3,
    }  # fmt: skip
    whole = api.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None and whole.content is not None
    streamed = [
        token
        for chunk in api.chat.completions.create(stream=True, **options)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    positions = values_of(want.outputs[0].logprobs)
    for content in (whole.content, streamed):
        assert len(content) == 6
        for token, ids, position in zip(content, want.outputs[0].token_ids, positions, strict=True):
            assert math.isclose(token.logprob, position[ids], abs_tol=1e-4)
            best = sorted(position.values(), reverse=True)[:3]
            assert [top.logprob for top in token.top_logprobs] == pytest.approx(best, abs=1e-4)
            assert token.top_logprobs[0].token == token.token  # greedy
    raw = b"".join(bytes(token.bytes or []) for token in whole.content)
    assert raw.decode("utf-8", "replace").startswith(want.outputs[0].text.rstrip("\ufffd"))
    options.pop("top_logprobs")
    plain = api.chat.completions.create(**options).choices[0].logprobs
    assert plain is not None and plain.content is not None
    assert [token.top_logprobs for token in plain.content] == [[]] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_logprobs_with_echo(stream: bool, served: Served, api: openai.OpenAI) -> None:
    want = over_zmq(served, PROMPT, logprobs=2, prompt_logprobs=2)
    got = ask(api, stream, prompt=PROMPT, echo=True, logprobs=2, max_tokens=6)
    assert got["text"] == PROMPT + want.outputs[0].text
    ids = [*(want.prompt_token_ids or ()), *want.outputs[0].token_ids]
    positions = values_of([*(want.prompt_logprobs or ()), *(want.outputs[0].logprobs or ())])
    assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
    assert len(got["tokens"]) == len(ids) == len(got["text_offset"])
    expected = [position[i] for i, position in zip(ids[1:], positions[1:], strict=True)]
    assert got["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    ends = [o + len(t) for o, t in zip(got["text_offset"], got["tokens"], strict=True)]
    assert got["text_offset"][1:] == ends[:-1]
    assert all(1 <= len(top) <= 3 for top in got["top_logprobs"][1:])


def test_a_prompt_can_be_scored_without_an_answer(api: openai.OpenAI) -> None:
    got = ask(api, False, prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
    longer = ask(api, False, prompt=PROMPT, echo=True, logprobs=1, max_tokens=1)
    assert got["text"] == PROMPT
    assert got["token_logprobs"] == longer["token_logprobs"][:-1]
    assert got["usage"].completion_tokens == 0


def test_prompt_logprobs_are_vllms(served: Served, api: openai.OpenAI) -> None:
    want = over_zmq(served, PROMPT, prompt_logprobs=1)
    body = {"extra_body": {"prompt_logprobs": 1}, "temperature": 0, "max_tokens": 6}
    choice = api.completions.create(model=BASE, prompt=PROMPT, **body).choices[0].model_dump()  # type: ignore[call-overload]
    assert choice["prompt_logprobs"][0] is None
    for got, position in zip(
        choice["prompt_logprobs"][1:], values_of(want.prompt_logprobs)[1:], strict=True
    ):
        assert {int(i): entry["logprob"] for i, entry in got.items()} == pytest.approx(position)
    chat = api.chat.completions.create(model=BASE, messages=CHAT, **body)  # type: ignore[call-overload]
    assert len(chat.model_dump()["prompt_logprobs"]) == chat.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs needs stream: false"):
        api.completions.create(model=BASE, prompt=PROMPT, stream=True, **body)  # type: ignore[call-overload]


def ask(api: openai.OpenAI, stream: bool, **options: Any) -> dict[str, Any]:
    """Returns text and logprobs of the only choice, joined if they were streamed."""
    got: dict[str, Any] = {"text": "", "usage": None}
    answer = api.completions.create(model=BASE, temperature=0, stream=stream, **options)
    for part in answer if stream else [answer]:
        choice = part.choices[0]
        got["text"] += choice.text
        got["usage"] = part.usage
        for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
            got[name] = got.get(name, []) + values
    return got
