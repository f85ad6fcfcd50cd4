"""Chats with tools: what the client gets for answers that hold calls, whole and streamed."""

import json
from typing import Any

import pytest

from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.tokenizer.chat_template import ChatTemplate
from loraplex.entrypoints.http.answers.chat_answer import ChatAnswer
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.bodies import ChatBody
from loraplex.entrypoints.http.tools.detection import find_parser
from loraplex.entrypoints.http.tools.parsers import PARSERS
from loraplex.entrypoints.http.tools.requested_tools import ToolFormats, ToolUse

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
ANSWERS = {
    "hermes": 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ürümqi"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Ürümqi"}};'
    ' {"name": "time", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ürümqi"}},'
    ' {"name": "time", "arguments": {}}]',
}
TEMPLATES = {
    "hermes": "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}\n{% endfor %}",
    "llama3_json": "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}\n{% endfor %}",
    "mistral": "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls[0].id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "[TOOL_CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}


def body(**fields: Any) -> ChatBody:
    messages = [{"role": "user", "content": "What is the weather?"}]
    return ChatBody.model_validate({"messages": messages, "tools": [WEATHER], **fields})


def entry(text: str, finish_reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {
        "index": index, "text": text, "finish_reason": finish_reason, "stop_reason": None,
        "token_ids": [1], "logprobs": [],
    }  # fmt: skip


def answer_of(parser: str, **fields: Any) -> ChatAnswer:
    return ChatAnswer(
        body(**fields), model="tiny", request_id="r", codec=None, make_parser=PARSERS[parser]
    )


def events_of(data: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n\n")]
    return [json.loads(line) for line in lines if line not in (b"", b"[DONE]")]


def check_calls(calls: list[dict[str, Any]]) -> None:
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
    assert found == [("weather", {"city": "Ürümqi"}), ("time", {})]
    assert all(call["type"] == "function" and len(call["id"]) == 9 for call in calls)
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize("parser", PARSERS)
def test_a_whole_answer(parser: str) -> None:
    answer = answer_of(parser)
    answer.add(0, {"outputs": [entry(ANSWERS[parser], "stop")]})
    (choice,) = json.loads(answer.end())["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == ("Let me look." if parser == "hermes" else None)
    check_calls(choice["message"]["tool_calls"])


@pytest.mark.parametrize("parser", PARSERS)
def test_a_stream(parser: str) -> None:
    answer, text = answer_of(parser, stream=True), ANSWERS[parser]
    data = b"".join(
        answer.add(0, {"outputs": [entry(text[i : i + 3])]}) for i in range(0, len(text), 3)
    )
    data += answer.add(0, {"outputs": [entry("", "stop")]}) + answer.end()
    choices = [event["choices"][0] for event in events_of(data)]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert content == ("Let me look." if parser == "hermes" else "")
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    check_calls(calls)
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_calls_is_as_without_tools(stream: bool) -> None:
    text = " It is {warm} <b>here</b>. \n"
    answers = []
    for parser in (None, PARSERS["hermes"]):
        answer = ChatAnswer(
            body(stream=stream), model="tiny", request_id="r", codec=None, make_parser=parser
        )
        data = answer.add(0, {"outputs": [entry(text, None if stream else "length")]})
        if stream:
            data += answer.add(0, {"outputs": [entry("", "length")]})
        data += answer.end()
        if not stream:
            (choice,) = json.loads(data)["choices"]
            answers.append((choice["message"]["content"], choice["finish_reason"]))
            assert "tool_calls" not in choice["message"]
        else:
            deltas = [event["choices"][0] for event in events_of(data)]
            answers.append(
                (
                    "".join(d["delta"].get("content", "") for d in deltas),
                    deltas[-1]["finish_reason"],
                )
            )
    assert answers[0] == answers[1] == (text, "length")


def test_each_of_several_choices_has_its_own_calls() -> None:
    answer = answer_of("hermes", n=2)
    answer.add(0, {"outputs": [entry("Nothing to do.", "stop", 1)]})
    answer.add(0, {"outputs": [entry(ANSWERS["hermes"], "stop", 0)]})
    first, second = json.loads(answer.end())["choices"]
    check_calls(first["message"]["tool_calls"])
    assert second["message"] == {"role": "assistant", "content": "Nothing to do."}
    assert second["finish_reason"] == "stop"


def test_one_call_alone_without_parallel_tool_calls() -> None:
    answer = answer_of("mistral", parallel_tool_calls=False)
    answer.add(0, {"outputs": [entry(ANSWERS["mistral"], "stop")]})
    (choice,) = json.loads(answer.end())["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_is_found_in_the_template(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], {})
    assert find_parser(template) == name
    formats = ToolFormats(TextCodec(tokenizer=None, chat_template=template))  # type: ignore[arg-type]
    assert formats.use_of(body()) == ToolUse(PARSERS.get(name))
    assert formats.use_of(body(tool_choice="none")) == ToolUse()
    assert formats.use_of(body(tools=None)) == ToolUse()


def test_tools_that_a_template_lists_are_no_calls() -> None:
    listed = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert find_parser(ChatTemplate(listed, {})) == ""


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tools": [{"type": "retrieval"}]}, r"tools\[0\] must be a function"),
        ({"tools": [WEATHER, {"type": "function", "function": {}}]}, r"tools\[1\].*name"),
        ({"tools": [WEATHER] * 129}, "at most 128"),
        ({"tool_choice": "sometimes"}, "tool_choice must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice must"),
        ({"tool_choice": "required", "tools": None}, "needs tools"),
    ],
)
def test_what_is_wrong_about_tools_is_said(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(HttpError, match=text):
        ToolFormats(None).use_of(body(**fields))


@pytest.mark.parametrize(
    ("choice", "text", "want"),
    [
        ("required", '[{"name": "weather", "parameters": {"a": 1}}]', ("weather", '{"a": 1}')),
        (NAMED, '{"a": [2]}', ("weather", '{"a": [2]}')),
        ("required", '[{"name": "weather", "para', None),
        (NAMED, '{"a": [', None),
    ],
)  # fmt: skip
def test_forced_calls(choice: Any, text: str, want: tuple[str, str] | None) -> None:
    use = ToolFormats(None).use_of(body(tool_choice=choice))
    answer = ChatAnswer(
        body(), model="tiny", request_id="r", codec=None, make_parser=use.make_parser
    )
    answer.add(0, {"outputs": [entry(text, "stop" if want else "length")]})
    (found,) = json.loads(answer.end())["choices"]
    if want is None:
        assert found["message"]["content"] == text and found["finish_reason"] == "length"
        return
    (call,) = found["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == want
