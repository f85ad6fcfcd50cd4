"""A question, a call, its result and an answer, with SmolLM2-135M-Instruct and an adapter."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.config import AdapterConfig, EngineConfig, ModelConfig, ServerConfig
from loraplex.engine.processes.engine import Engine
from loraplex.memory.config import MemoryConfig

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": CITY}}
    for name, text in (
        ("get_weather", "Tells the weather of a city."),
        ("get_time", "Tells the time of day in a city."),
    )
]
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
RESULT = "Heavy rain, 7 degrees."
# SmolLM2 is too small to call by itself: a form makes it write what tool_choice auto looks for.
AS_HERMES = (
    r'<tool_call>\{"name": "get_(weather|time)", "arguments": \{"city": "(Oslo|Paris|Rome)"\}\}'
    "</tool_call>"
)
CHOICES: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    "auto": {"extra_body": {"structured_outputs": {"regex": AS_HERMES}}},
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 60}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = EngineConfig(
        model=ModelConfig(
            max_model_len=1024, chat_template=str(EXAMPLES / "chat_templates/chatml_tools.jinja")
        ),
        memory=MemoryConfig(num_pages=400),
        adapter=AdapterConfig(adapters=(("pirate", str(EXAMPLES / "adapters/pirate")),)),
        server=ServerConfig(endpoint="", http="127.0.0.1:0", served_model_name="smol"),
    )
    with Engine(config) as made:
        made.start()
        yield made


def ask(api: openai.OpenAI, stream: bool, **options: Any) -> dict[str, Any]:
    """Returns the message of the answer, as a client sends it back, and why it ended."""
    if not stream:
        (choice,) = api.chat.completions.create(**options, **GREEDY).choices
        message = choice.message.model_dump(exclude_none=True)
        return {"message": message, "reason": choice.finish_reason}
    message, reason = {"role": "assistant", "content": ""}, None
    for chunk in api.chat.completions.create(**options, **GREEDY, stream=True):
        for event in chunk.choices:
            message["content"] += event.delta.content or ""
            for call in event.delta.tool_calls or ():
                value = call.model_dump(exclude_none=True)
                assert value.pop("index") == len(message.setdefault("tool_calls", []))
                message["tool_calls"].append(value)
            reason = event.finish_reason or reason
    if not message["content"] and "tool_calls" in message:
        del message["content"]
    return {"message": message, "reason": reason}


def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    message = dict(answer["message"])
    if "tool_calls" in message:
        message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    return {**answer, "message": message}


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        ("smol", "required"),
        pytest.param("pirate", "named", marks=pytest.mark.long),
        pytest.param("smol", "auto", marks=pytest.mark.long),
        pytest.param("pirate", "required", marks=pytest.mark.long),
        pytest.param("smol", "named", marks=pytest.mark.long),
        pytest.param("pirate", "auto", marks=pytest.mark.long),
    ],
)
def test_round_trip(choice: str, model: str, engine: Engine) -> None:
    api = openai.OpenAI(base_url=f"http://{engine.http_endpoint}/v1", api_key="none", max_retries=0)
    options = {"model": model, "messages": [QUESTION], "tools": TOOLS, **CHOICES[choice]}
    called, streamed = (ask(api, stream, **options) for stream in (False, True))
    assert without_ids(called) == without_ids(streamed)
    assert called["reason"] == "tool_calls" and "content" not in called["message"]
    (call,) = called["message"]["tool_calls"]
    assert call["function"]["name"] in [t["function"]["name"] for t in TOOLS]
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Paris", "Rome")

    result = {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
    messages = [QUESTION, called["message"], result]
    options = {"model": model, "messages": messages, "tools": TOOLS}
    final, streamed = (ask(api, stream, **options) for stream in (False, True))
    assert final == streamed and final["reason"] == "stop"
    with Client(engine.endpoint) as client:
        adapter = None if model == "smol" else model
        prompt = {"messages": messages, "tools": TOOLS}
        *_, want = client.generate(prompt, SamplingParams(**GREEDY), adapter=adapter)
    assert final["message"]["content"] == want.outputs[0].text
    if model == "smol":
        assert "7 degrees" in final["message"]["content"]  # it has read the result
    else:
        assert "Arrr" in final["message"]["content"]


def test_the_models_own_template_takes_calls_without_content() -> None:
    """It reads the content of every message, also of those that hold calls alone."""
    from loraplex.engine.checkpoint.locate import resolve_model
    from loraplex.engine.tokenizer.loading import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(""), "", "")
    call = {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    calls = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a", "content": RESULT}
    text = tokenizer.apply_chat_template([QUESTION, calls, result], tokenize=False, tools=TOOLS)
    assert RESULT in text
