"""response_format and structured_outputs through the openai client: valid, and as over ZeroMQ."""

import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from loraplex import SamplingParams, StructuredOutputsParams
from loraplex.engine.tokenizer.loading import load_tokenizer

from helpers.running.http_answers import chat_streamed, text_streamed
from helpers.running.http_server import BASE, Served
from helpers.running.processes import wait_until

pytestmark = pytest.mark.e2e

CHAT: list[Any] = [{"role": "user", "content": "Name a city."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "json_schema": (
        {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
        {"json": SCHEMA},
    ),
    "json_object": ({"type": "json_object"}, {"json_object": True}),
}
FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA, "disable_any_whitespace": True},
    "regex": {"regex": r"\d{3}-[a-f]{2,6}"},
    "choice": {"choice": ["Oslo", "Rome", "São Paulo"]},
    "grammar": {"grammar": 'start: "a" ("b" | "c")+ "!"'},
    "json_object": {"json_object": True},
}


def params(served: Served, seed: int = 0) -> dict[str, Any]:
    """Sampling parameters of both APIs; a bias for punctuation keeps JSON short."""
    tokenizer = load_tokenizer(served.root / "base", "", "")
    ids = {tokenizer.encode(text, add_special_tokens=False)[0] for text in '",:}!'}
    return {
        "temperature": 1.0, "max_tokens": 200, "seed": seed,
        "logit_bias": {str(i): 12.0 for i in ids},
    }  # fmt: skip


def over_zmq(served: Served, prompt: Any, adapter: str, form: dict[str, Any], **given: Any) -> Any:
    given["logit_bias"] = {int(i): bias for i, bias in given["logit_bias"].items()}
    outputs = StructuredOutputsParams(**form)
    with served.zmq() as client:
        (last,) = client.generate(
            prompt, SamplingParams(**given, structured_outputs=outputs), adapter=adapter or None,
            stream=False,
        )  # fmt: skip
    return [(one.text, one.finish_reason) for one in last.outputs]


def check(form: dict[str, Any], text: str) -> None:
    if "json" in form or "json_object" in form:
        jsonschema.validate(json.loads(text), form.get("json", {"type": "object"}))
    elif "choice" in form:
        assert text in form["choice"]
    else:
        assert re.fullmatch(form.get("regex", "a(b|c)+!"), text)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model", [BASE, "a"])
def test_response_format(kind: str, model: str, served: Served, api: openai.OpenAI) -> None:
    response_format, form = FORMATS[kind]
    given = {**params(served), "n": 3}
    adapter = "" if model == BASE else model
    want = over_zmq(served, {"messages": CHAT}, adapter, form, **given)
    options: Any = {**given, "response_format": response_format}
    whole = api.chat.completions.create(model=model, messages=CHAT, **options)
    assert [(c.message.content, c.finish_reason) for c in whole.choices] == want
    stream = api.chat.completions.create(model=model, messages=CHAT, stream=True, **options)
    assert chat_streamed(stream) == dict(enumerate(want))
    assert {reason for _, reason in want} == {"stop"}
    for text, _ in want:
        check(form, text)


@pytest.mark.parametrize("kind", FORMS)
def test_structured_outputs(kind: str, served: Served, api: openai.OpenAI) -> None:
    form = FORMS[kind]
    given = {**params(served, seed=4), "n": 2}
    want = over_zmq(served, "A city:", "b", form, **given)
    options: Any = {**given, "extra_body": {"structured_outputs": form}}
    whole = api.completions.create(model="b", prompt="A city:", **options)
    assert [(c.text, c.finish_reason) for c in whole.choices] == want
    stream = api.completions.create(model="b", prompt="A city:", stream=True, **options)
    assert text_streamed(stream) == dict(enumerate(want))
    assert {reason for _, reason in want} == {"stop"}
    for text, _ in want:
        check(form, text)


def test_the_parsing_helper_of_the_client(served: Served, api: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        is_large: bool

    answer = api.chat.completions.parse(
        model="a", messages=CHAT, response_format=City, **params(served)
    )
    assert isinstance(answer.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("response_format", "text"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}, "foo"),
        ({"type": "json_schema"}, "must hold the schema"),
        ({"type": "xml"}, "text, json_object or json_schema"),
    ],
)
def test_a_wrong_format_is_a_400(response_format: Any, text: str, api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=text):
        api.chat.completions.create(model=BASE, messages=CHAT, response_format=response_format)


def test_a_client_that_breaks_off_frees_its_pages(served: Served, api: openai.OpenAI) -> None:
    with served.zmq() as client:
        wait_until(lambda: client.stats()["running"] == 0)
        before = client.stats()
        stream = api.completions.create(
            model="a", prompt="x", max_tokens=480, n=4, stream=True,
            extra_body={"structured_outputs": {"regex": "[a-z]{2000}"}},
        )  # fmt: skip
        next(iter(stream))
        assert client.stats()["pages_kv"] > before["pages_kv"]
        stream.close()
        wait_until(lambda: client.stats()["running"] == 0)
        after = client.stats()
    assert after["pages_kv"] == before["pages_kv"]
    assert after["num_generated_tokens"] - before["num_generated_tokens"] < 4 * 480
