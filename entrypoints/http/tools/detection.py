"""Finds the format in which a model writes function calls."""

from typing import Any

from loraplex.engine.errors import ClientError
from loraplex.engine.tokenizer.chat_template import ChatTemplate

_CALL = {
    "id": "abcdefghi",  # Mistral's templates want nine characters
    "type": "function",
    "function": {"name": "probe_function", "arguments": {"probe_argument": 1}},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_argument": {"type": "integer"}}},
    },
}
_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "A question."},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "probe_function", "content": "1"},
]
_MARKS = (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ('"parameters"', "llama3_json"))


def find_parser(template: ChatTemplate | None) -> str:
    """Returns the name in PARSERS of the format that the template writes calls in, "" if none.

    It looks at how the template renders a call: the model has learned to write the same.
    """
    if template is None:
        return ""
    for chat in (_CHAT, _CHAT[:2]):
        try:
            text = template.render(chat, add_generation_prompt=False, tools=[_TOOL])
        except ClientError:
            continue
        at = text.rfind("probe_argument")
        begin = max(text.rfind(word, 0, at) for word in ("A question.", "A probe."))
        call = text[begin : at + 100] if begin >= 0 else text
        for mark, name in _MARKS:
            if mark in call:
                return name
    return ""
