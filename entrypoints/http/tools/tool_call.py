"""A function call that a model has written, and the checks of its text."""

import json
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 128  # of one answer; more is text


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


Part = str | ToolCall
"""A find of a parser: text for the client, or a call."""


def call_from(value: Any) -> ToolCall | None:
    """Returns the call of {"name", and "arguments" or "parameters"}, None if it is no such object.

    Arguments that are the text of a JSON object are that object; null is none. Other keys, a number
    that JSON does not have, or half a character make it no call: it is passed on as text then.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    keys = value.keys() - {"name", "id", "type"}
    if len(keys) != 1 or not keys <= {"arguments", "parameters"}:
        return None
    (arguments,) = (value[key] for key in keys)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (value["name"] + text).encode()
    except ValueError:
        return None
    return ToolCall(value["name"], text)


def read_json(text: str, start: int) -> tuple[Any, int] | None:
    """Returns the JSON value that starts at `start` and where it ends, None if there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value, end


def skip_space(text: str, start: int) -> int:
    """Returns the place of the first character from `start` on that is no white space."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start
