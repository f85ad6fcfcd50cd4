"""The openai client gets the answers that ZeroMQ clients get, field by field."""

import asyncio
from typing import Any

import openai
import pytest

from loraplex import RequestOutput, SamplingParams
from loraplex.engine.tokenizer.loading import load_tokenizer

from helpers.running.http_answers import chat_streamed, text_streamed
from helpers.running.http_server import BASE, Served
from helpers.running.mixed_requests import (
    mixed_jobs,
    texts_over_http,
    texts_over_sync_http,
    texts_over_zmq,
)

pytestmark = pytest.mark.e2e
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
CHAT = [{"role": "user", "content": "What is a page?"}]


def zmq_answer(
    served: Served, prompt: Any, adapter: str = "", salt: str = "", **params: Any
) -> RequestOutput:
    with served.zmq() as client:
        *_, last = client.generate(
            prompt, SamplingParams(**params), adapter=adapter or None, salt=salt
        )
    return last


FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    {"temperature": 1.0, "seed": 7, "n": 3},
    {"stop": ["e", "zz"]},
    {"presence_penalty": 1.0, "frequency_penalty": -0.5},
    {"logit_bias": {"70": 9.0, "71": -50.0}},
    {"temperature": 1.3, "seed": 1, "extra_body": {"top_k": 5, "min_p": 0.05}},
    {"extra_body": {"repetition_penalty": 1.4, "min_tokens": 4, "ignore_eos": True}},
    {"extra_body": {"bad_words": ["a", "e", "the"]}},
    {"stop": "a", "extra_body": {"include_stop_str_in_output": True}},
    {"extra_body": {"stop_token_ids": list(range(100, 140)), "skip_special_tokens": False}},
    {"extra_body": {"cache_salt": "tenant", "priority": 3}},
]


def params_of(fields: dict[str, Any]) -> dict[str, Any]:
    params = {**GREEDY, **fields, **fields.get("extra_body", {})}
    for name in ("extra_body", "cache_salt", "priority"):
        params.pop(name, None)
    if "logit_bias" in params:
        params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
    return params


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(fields) or "greedy")
def test_completions_equal_the_answers_over_zmq(
    fields: dict[str, Any], served: Served, api: openai.OpenAI
) -> None:
    options = {**GREEDY, **fields}
    want = zmq_answer(served, "Numbers: 0 1 2", "a", **params_of(fields))
    whole = api.completions.create(model="a", prompt="Numbers: 0 1 2", **options)
    assert [choice.text for choice in whole.choices] == [c.text for c in want.outputs]
    assert [c.finish_reason for c in whole.choices] == [c.finish_reason for c in want.outputs]
    assert [c.index for c in whole.choices] == list(range(len(want.outputs)))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(want.prompt_token_ids or ())
    assert whole.usage.completion_tokens == sum(len(c.token_ids) for c in want.outputs)
    stream = api.completions.create(model="a", prompt="Numbers: 0 1 2", stream=True, **options)
    assert text_streamed(stream) == {c.index: (c.text, c.finish_reason) for c in want.outputs}


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(fields) or "greedy")
def test_chats_equal_the_answers_over_zmq(
    fields: dict[str, Any], served: Served, api: openai.OpenAI
) -> None:
    options = {**GREEDY, **fields}
    want = zmq_answer(served, {"messages": CHAT}, "b", **params_of(fields))
    whole = api.chat.completions.create(model=f"{BASE}:b", messages=CHAT, **options)
    assert [c.message.content for c in whole.choices] == [c.text for c in want.outputs]
    assert [c.finish_reason for c in whole.choices] == [c.finish_reason for c in want.outputs]
    assert {c.message.role for c in whole.choices} == {"assistant"}
    stream = api.chat.completions.create(model="b", messages=CHAT, stream=True, **options)
    assert chat_streamed(stream) == {c.index: (c.text, c.finish_reason) for c in want.outputs}


def test_prompts_may_be_lists_of_texts_and_of_token_ids(served: Served, api: openai.OpenAI) -> None:
    texts = ["one", "a page holds", "Grüße"]
    want = [zmq_answer(served, text, **GREEDY) for text in texts]
    ids = [list(output.prompt_token_ids or ()) for output in want]
    for prompt in (texts, ids):
        got = api.completions.create(model=BASE, prompt=prompt, **GREEDY)
        assert [choice.text for choice in got.choices] == [w.outputs[0].text for w in want]
        assert got.usage is not None
        assert got.usage.prompt_tokens == sum(map(len, ids))
        stream = api.completions.create(model=BASE, prompt=prompt, stream=True, **GREEDY)
        assert {i: text for i, (text, _) in text_streamed(stream).items()} == {
            i: w.outputs[0].text for i, w in enumerate(want)
        }
    got = api.completions.create(model=BASE, prompt=ids[1], **GREEDY)
    assert got.choices[0].text == want[1].outputs[0].text
    pair = api.completions.create(model=BASE, prompt=texts[:2], n=2, seed=3, max_tokens=5)
    assert [choice.index for choice in pair.choices] == [0, 1, 2, 3]
    one = zmq_answer(served, texts[1], n=2, seed=3, max_tokens=5)
    assert [c.text for c in pair.choices[2:]] == [c.text for c in one.outputs]


def test_max_tokens_defaults_to_sixteen_for_completions_and_the_context_for_chats(
    api: openai.OpenAI,
) -> None:
    ignore = {"extra_body": {"ignore_eos": True}}
    text = api.completions.create(model=BASE, prompt="x", temperature=0, **ignore)
    assert text.usage is not None and text.usage.completion_tokens == 16
    chat = api.chat.completions.create(model=BASE, messages=CHAT, temperature=0, **ignore)
    assert chat.usage is not None and chat.usage.total_tokens == 512
    for name in ("max_tokens", "max_completion_tokens"):
        options: dict[str, Any] = {name: 3}
        chat = api.chat.completions.create(model=BASE, messages=CHAT, **ignore, **options)
        assert chat.usage is not None and chat.usage.completion_tokens == 3


def test_content_parts_and_template_options(served: Served, api: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    want = zmq_answer(served, {"messages": CHAT}, **GREEDY)
    got = api.chat.completions.create(model=BASE, messages=parts, **GREEDY)  # type: ignore[arg-type]
    assert got.choices[0].message.content == want.outputs[0].text
    begun = [*CHAT, {"role": "assistant", "content": "A page is"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    want = zmq_answer(served, {"messages": begun, **options}, **GREEDY)
    got = api.chat.completions.create(model=BASE, messages=begun, extra_body=options, **GREEDY)
    assert got.choices[0].message.content == want.outputs[0].text
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="reads text alone"):
        api.chat.completions.create(model=BASE, messages=image, **GREEDY)  # type: ignore[arg-type]


def test_usage_of_streams(api: openai.OpenAI) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = api.chat.completions.create(model=BASE, messages=CHAT, **GREEDY, **options)
    whole = api.chat.completions.create(model=BASE, messages=CHAT, **GREEDY)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.prompt_tokens_details is not None
    *_, last_text = api.completions.create(model=BASE, prompt="x", **GREEDY, **options)
    assert last_text.usage is not None and last_text.usage.completion_tokens == 12
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_repeated_prompts_report_cached_tokens(api: openai.OpenAI) -> None:
    prompt = "A page holds sixteen tokens. " * 8
    usages = [api.completions.create(model=BASE, prompt=prompt, **GREEDY).usage for _ in range(2)]
    assert usages[1] is not None and usages[1].prompt_tokens_details is not None
    cached = usages[1].prompt_tokens_details.cached_tokens
    assert cached and cached % 16 == 0
    salted = api.completions.create(
        model=BASE, prompt=prompt, extra_body={"cache_salt": "other"}, **GREEDY
    ).usage
    assert salted is not None and salted.prompt_tokens_details is not None
    assert salted.prompt_tokens_details.cached_tokens == 0


def test_a_hundred_mixed_requests_at_once_equal_those_over_zmq(served: Served) -> None:
    jobs = mixed_jobs(100)
    want = texts_over_zmq(served, jobs)
    assert asyncio.run(texts_over_http(served, jobs)) == want
    assert texts_over_sync_http(served, jobs) == want


def test_tokens_are_those_of_the_models_tokenizer(served: Served, api: openai.OpenAI) -> None:
    tokenizer = load_tokenizer(served.root / "base", "", "")

    def post(path: str, **body: Any) -> dict[str, Any]:
        return dict(api.post(f"{served.url}{path}", body=body, cast_to=dict[str, Any]))

    text = "Grüße, 你好"
    got = post("/tokenize", model=BASE, prompt=text, return_token_strs=True)
    assert got["tokens"] == tokenizer.encode(text) and got["count"] == len(got["tokens"])
    assert got["token_strs"] == [tokenizer.id_to_token(i) for i in got["tokens"]]
    assert got["max_model_len"] == 512
    plain = post("/tokenize", prompt=text, add_special_tokens=False)
    assert plain["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    chat = post("/tokenize", messages=CHAT)
    assert chat["tokens"] == tokenizer.apply_chat_template(CHAT, tokenize=True)
    assert post("/detokenize", tokens=plain["tokens"])["prompt"] == text
    assert post("/tokenize", prompt="page " * 600)["count"] > 512


def test_token_ids_and_seeds_survive_the_round_trip(served: Served, api: openai.OpenAI) -> None:
    want = zmq_answer(served, "Rome", seed=11, max_tokens=9)
    options: dict[str, Any] = {
        "seed": 11,
        "max_tokens": 9,
        "extra_body": {"return_token_ids": True},
    }
    got = api.completions.create(model=BASE, prompt="Rome", **options).choices[0].model_dump()
    assert got["token_ids"] == list(want.outputs[0].token_ids)
    assert got["prompt_token_ids"] == list(want.prompt_token_ids or ())
    ids: list[int] = []
    for chunk in api.completions.create(model=BASE, prompt="Rome", stream=True, **options):
        ids += chunk.choices[0].model_dump()["token_ids"]
    assert ids == list(want.outputs[0].token_ids)
