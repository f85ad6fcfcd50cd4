"""Converters from the text of a flag to its value, for argparse's `type`.

Each raises argparse.ArgumentTypeError with a message that quotes the text.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """Bytes from `4096`, `512M` or `2.5GiB` (binary units)."""
    number = text.lower().removesuffix("b").removesuffix("i")
    shift = _UNITS.get(number[-1:], 0)
    try:
        return int(float(number[:-1] if shift else number) * (1 << shift))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: write bytes, or a number with K, M, G or T"
        ) from None


def format_size(num_bytes: int) -> str:
    """The shortest text that parse_size reads as this number."""
    for unit, shift in reversed(_UNITS.items()):
        if num_bytes and num_bytes % (1 << shift) == 0:
            return f"{num_bytes >> shift}{unit.upper()}"
    return str(num_bytes)


def parse_pair(text: str) -> tuple[str, str]:
    """(NAME, VALUE) from NAME=VALUE; neither may be empty."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} should read NAME=VALUE")
    return name, value


def parse_bias(text: str) -> tuple[int, float]:
    """(token id, value) from TOKEN_ID=VALUE."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should read TOKEN_ID=VALUE") from None


def parse_ints(text: str) -> list[int]:
    """Integers from `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should read like 1,2,3") from None


def natural(text: str) -> int:
    """An integer of at least 0."""
    return int(_number(text, int, lambda value: value >= 0, "a whole number, 0 or more"))


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return int(_number(text, int, lambda value: value > 0, "a whole number above 0"))


def positive(text: str) -> float:
    """A finite number above 0."""
    return float(_number(text, float, lambda value: value > 0, "a number above 0"))


def parse_rate(text: str) -> float:
    """A number above 0, or infinity from `inf`."""
    return math.inf if text == "inf" else positive(text)


def bounds(text: str) -> tuple[int, int]:
    """(low, high) from LOW,HIGH with 0 < low < high."""
    values = list_of(positive_int)(text)
    if len(values) != 2 or values[0] >= values[1]:
        raise argparse.ArgumentTypeError(f"{text!r} should read LOW,HIGH with LOW below HIGH")
    return values[0], values[1]


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Makes the converter of a comma-separated list."""
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def one_of(*names: str) -> Callable[[str], str]:
    """Makes the converter that accepts these names only."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return check


def _number(
    text: str, kind: Callable[[str], Any], is_allowed: Callable[[Any], bool], wanted: str
) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_allowed(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
