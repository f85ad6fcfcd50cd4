"""Calls in answers: however the text is cut, the same calls and the same text are found."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.entrypoints.http.tools.parsers import PARSERS
from loraplex.entrypoints.http.tools.tool_call import Part, ToolCall

EMPTY_CALL = '{"name": "f", "arguments": {}}'
MARKS = [
    f"<tool_call>{EMPTY_CALL}</tool_call>",
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
    EMPTY_CALL, '{"name": "f", "parameters": {"a": 1}}', "f",
]  # fmt: skip

names = st.text("abcdefghij_-.0123456789", min_size=1, max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("</tool_call> [{"),
    lambda p: st.lists(p, max_size=3) | st.dictionaries(st.text(max_size=5), p, max_size=3),
    max_leaves=6,
)  # fmt: skip
objects = st.dictionaries(st.text(max_size=8), values, max_size=4)
calls = st.lists(st.tuples(names, objects), min_size=1, max_size=4)
Calls = list[tuple[str, dict[str, Any]]]


def write_hermes(calls: Calls) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )


def write_llama3(calls: Calls) -> str:
    return "; ".join(json.dumps({"name": n, "parameters": a}, ensure_ascii=False) for n, a in calls)


def write_llama3_tagged(calls: Calls) -> str:
    return "<|python_tag|>" + write_llama3(calls)


def write_mistral_list(calls: Calls) -> str:
    return "[TOOL_CALLS]" + json.dumps([{"name": n, "arguments": a} for n, a in calls])


def write_mistral_named(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(a)}" for name, a in calls)


WRITERS = [
    ("hermes", write_hermes),
    ("llama3_json", write_llama3),
    ("llama3_json", write_llama3_tagged),
    ("mistral", write_mistral_list),
    ("mistral", write_mistral_named),
]


def parse(name: str, pieces: list[str]) -> list[Part]:
    parser = PARSERS[name]()
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


places = st.lists(st.integers(0, 10_000), max_size=30)


@pytest.mark.parametrize(("parser", "write"), WRITERS)
@given(calls=calls, places=places)
def test_calls_are_found_however_the_answer_is_cut(
    parser: str, write: Any, calls: Calls, places: list[int]
) -> None:
    text = write(calls)
    if parser == "hermes" and "</tool_call>" in text.replace("\n</tool_call>", ""):
        return  # a closing mark within a call ends it: no JSON of a model holds one
    parts = parse(parser, cut(text, places))
    assert all(isinstance(part, ToolCall) for part in parts)
    assert [(part.name, json.loads(part.arguments)) for part in parts] == calls


@pytest.mark.parametrize("parser", PARSERS)
@given(
    text=st.lists(
        st.text("ab{}[]\":,; \n", max_size=6)
        | st.sampled_from(MARKS),
        max_size=8,
    ).map("".join),
    places=places,
)  # fmt: skip
def test_any_text_gives_the_same_parts_however_it_is_cut(
    parser: str, text: str, places: list[int]
) -> None:
    whole = parse(parser, [text])
    assert parse(parser, cut(text, places)) == whole
    if all(isinstance(part, str) for part in whole):
        assert "".join(whole) == text


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", "<tool_call>{'name': 'f'}</tool_call> and more"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}'),
        ("llama3_json", '{"name": "f", "parameters": {}} and that is all'),
        ("llama3_json", '{"city": "Paris"}'),
        ("llama3_json", '{"name": "Paris", "population": 2}'),
        ("llama3_json", '{"name": "Paris", "arguments": {}, "population": 2}'),
        ("llama3_json", '{"name": "f", "parameters": {"a": "\\ud83d"}}'),
        ("hermes", '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1e999}'),
        ("mistral", "[TOOL_CALLS]f"),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, 3]'),
    ],
)
def test_what_only_looks_like_a_call_is_text(parser: str, text: str) -> None:
    assert "".join(parse(parser, list(text))) == text


@pytest.mark.parametrize("parser", PARSERS)
def test_text_streams_while_no_call_has_begun(parser: str) -> None:
    reader = PARSERS[parser]()
    assert reader.feed("The weather") == ["The weather"]
    assert reader.feed(" is fine <3") == [" is fine <3"]
    assert reader.finish() == []


def test_text_and_calls_of_one_answer() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    text = f"Let me see.\n{call}\n{call}\nThere."
    found = ToolCall("f", '{"a": 1}')
    assert parse("hermes", list(text)) == ["Let me see.", found, found, "There."]
