"""Finds the format in which a model writes function calls."""

from typing import Any

from loraplex.engine.errors import ClientError
from loraplex.engine.tokenizer.chat_template import ChatTemplate

_CALL = {
    "id": "abcdefghi",  # Mistral's templates want nine characters
    "type": "function",
    "function": {"name": "probe_call", "arguments": {"probe_argument": 1}},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "A question."},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "probe_call", "content": "1"},
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
        begin, end = text.rfind("A question."), text.find("probe_argument")
        call = text[max(begin, 0) : end]
        if end < 0 or "probe_call" not in call:
            continue  # it leaves calls out, or writes them in another way
        for mark, name in _MARKS:
            if mark in call:
                return name
    return ""
