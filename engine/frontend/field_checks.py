"""Checks for the fields of a client's message.

A check takes the decoded value and returns the value to keep. It raises TypeError, ValueError or
OverflowError with a text that continues "<field>: ".
"""

import math
from array import array
from collections.abc import Callable
from typing import Any

from loraplex.engine.adapters.paths import ADAPTER_NAME

Check = Callable[[Any], Any]
MAX_ID_CHARS = 256


def text(max_chars: int, *, empty: bool = True) -> Check:
    """Returns a check for strings of at most `max_chars` characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"must be a string, got {type_name(value)}")
        if len(value) > max_chars or (not empty and not value):
            raise ValueError(
                f"must have {0 if empty else 1} to {max_chars} characters, got {len(value)}"
            )
        return value

    return check


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"must be a bool, got {type_name(value)}")
    return value


def int32(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"must be an integer, got {type_name(value)}")
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"must fit 32 bits, got {value}")
    return value


def seconds(value: Any) -> float:
    """Returns a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"must be a number, got {type_name(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"must be a number of seconds above 0, got {short(value)}")
    return float(value)


def integer(least: int, most: int) -> Check:
    """Returns a check for integers from `least` to `most`."""

    def check(value: Any) -> int:
        if not least <= int32(value) <= most:
            raise ValueError(f"must be from {least} to {most}, got {value}")
        return int(value)

    return check


def token_ids(value: Any) -> "array[int]":
    """Returns the ids as int32."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise TypeError("must be a list of integers")
    try:
        return array("i", value)
    except OverflowError:
        raise ValueError("holds a token id that does not fit 32 bits") from None


def conversation(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise TypeError("must be a list of one or more maps")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
            raise TypeError("each message must be a map with string keys")
        if not isinstance(message.get("role"), str):
            raise TypeError('each message needs a string "role"')
        if not isinstance(message.get("content"), str | list | None):
            raise TypeError('the "content" of a message must be a string or a list of parts')
    return value


def list_of_maps(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise TypeError("must be a list of maps")
    return value


def template_variables(value: Any) -> dict[str, Any]:
    """Checks names and values for a chat template; nil stands for none."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError("must be a map with string keys")
    for key in ("messages", "chat_template", "tokenize"):
        if key in value:
            raise ValueError(f"must not set {key!r}: it is not a variable of the template")
    return value


def adapter_name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be a string, got {type_name(value)}")
    if not ADAPTER_NAME.fullmatch(value):
        raise ValueError(
            f"{value[:40]!r} is not an adapter name: use 1 to 200 letters, digits and "
            ". _ : / @ + -, and begin with a letter, a digit or _"
        )
    return value


def optional_adapter_name(value: Any) -> str:
    """Returns "" (the base model) for nil and for the empty string."""
    return "" if value is None or value == "" else adapter_name(value)


def type_name(value: object) -> str:
    return type(value).__name__


def short(value: object) -> str:
    """Returns at most some 50 characters that show a wrong value.

    Never writes out the whole value first: it may be a list of a million entries.
    """
    if isinstance(value, str | bytes):
        return repr(value[:40])
    if isinstance(value, list | tuple | dict | set):
        return f"a {type_name(value)} of {len(value)} entries"
    return f"{value!r:.40}"
