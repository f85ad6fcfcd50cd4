"""Tools through the openai client and a real engine, whose chat template shows Hermes' calls."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from loraplex.engine.processes.engine import Engine

from helpers.running.http_server import http_config, make_models

pytestmark = pytest.mark.e2e

TEMPLATE = (
    "{% for t in tools or [] %}TOOL {{ t.function.name }}{{ '\\n' }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}},
}
CHAT: list[Any] = [
    {"role": "user", "content": "What is the weather in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "content": "rain"},
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("tools")
    make_models(root)
    (root / "hermes.jinja").write_text(TEMPLATE)
    config = http_config(root)
    model = replace(config.model, chat_template=str(root / "hermes.jinja"))
    with Engine(replace(config, model=model)) as engine:
        engine.start()
        yield f"http://{engine.http_endpoint}"


@pytest.fixture(scope="module")
def api(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_tools_and_their_answers_go_through_the_template(url: str, api: openai.OpenAI) -> None:
    body = {"messages": CHAT, "tools": [WEATHER]}
    tokens = httpx.post(f"{url}/tokenize", json=body, timeout=60).json()["tokens"]
    text = httpx.post(f"{url}/detokenize", json={"tokens": tokens}, timeout=60).json()["prompt"]
    assert text == (
        "TOOL weather\nuser: What is the weather in Oslo?\nassistant: "
        '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>\n'
        "tool: rain\nassistant: "
    )
    answer = api.chat.completions.create(
        model="tiny", messages=CHAT, tools=[WEATHER], max_tokens=8, temperature=0.0
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == len(tokens)
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and choice.message.content is not None
    assert choice.message.tool_calls is None


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"], "additionalProperties": False}  # fmt: skip
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": CITY}}
    for name in ("weather", "time")
]
NAMED = {"type": "function", "function": {"name": "time"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_fit_the_functions(api: openai.OpenAI, choice: Any, stream: bool) -> None:
    options: dict[str, Any] = {
        "model": "tiny", "messages": CHAT[:1], "tools": TOOLS, "tool_choice": choice,
        "parallel_tool_calls": False, "max_tokens": 120, "temperature": 1.0, "seed": 3,
    }  # fmt: skip
    if stream:
        events = list(api.chat.completions.create(**options, stream=True))
        deltas = [event.choices[0].delta for event in events if event.choices]
        (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
        reason = events[-1].choices[0].finish_reason
    else:
        (answer,) = api.chat.completions.create(**options).choices
        (call,) = answer.message.tool_calls or ()
        reason = answer.finish_reason
    assert reason == "tool_calls"
    assert call.function.name in ("weather", "time")[choice == NAMED :]
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_calls_that_the_model_writes_are_found(api: openai.OpenAI) -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    (choice,) = api.chat.completions.create(
        model="tiny", messages=CHAT[:1], tools=TOOLS, max_tokens=120,
        extra_body={"structured_outputs": {"choice": [text]}},
    ).choices  # fmt: skip
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
    assert choice.message.content is None and choice.finish_reason == "tool_calls"


def test_a_forced_call_and_another_form_do_not_go_together(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        api.chat.completions.create(
            model="tiny", messages=CHAT[:1], tools=TOOLS, tool_choice="required",
            response_format={"type": "json_object"},
        )  # fmt: skip
