"""Regular expressions from an adapter's configuration, kept to those that match in little time.

They come from whoever made the adapter, and Python's matcher backtracks: a pattern such as
``(a+)+b`` would hold the process for ever.
"""

import re
from re import _constants as regex  # type: ignore[attr-defined]
from re import _parser as regex_parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN_CHARS = 2048
MAX_LOOPS = 4
"""Open-ended repeats one after another: at worst the time is the name's length to this power."""
MAX_FIXED_REPEAT = 64

_REPEATS = (regex.MAX_REPEAT, regex.MIN_REPEAT, regex.POSSESSIVE_REPEAT)


class PatternError(ValueError):
    """The pattern is invalid or too costly; the text names the field."""


def compile_pattern(field: str, pattern: object, template: str) -> re.Pattern[str]:
    """`template` with its ``{}`` replaced by `pattern`, compiled."""
    if not isinstance(pattern, str):
        raise PatternError(f"{field}: a pattern must be text, got {pattern!r:.40}")
    if len(pattern) > MAX_PATTERN_CHARS:
        raise PatternError(f"{field}: a pattern is longer than {MAX_PATTERN_CHARS} characters")
    try:
        if _num_loops(regex_parser.parse(pattern), inside=False) > MAX_LOOPS:
            raise PatternError(f"more than {MAX_LOOPS} open repeats in a row")
        return re.compile(template.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError, PatternError) as error:
        raise PatternError(
            f"{field}: cannot use the regular expression {pattern!r:.80}: {error}"
        ) from None


def _num_loops(parsed: Any, *, inside: bool) -> int:
    """Open-ended repeats in sequence; one inside another, or a choice inside one, is an error."""
    total = 0
    for code, argument in parsed:
        if code in _REPEATS:
            low, high, body = argument
            repeats = high is regex.MAXREPEAT or high > 1
            if inside and repeats and high != low:
                raise PatternError("a repeat inside a repeat may take for ever to match")
            if low > MAX_FIXED_REPEAT:
                raise PatternError(f"a repeat of more than {MAX_FIXED_REPEAT} times")
            total += int(repeats and high != low) + _num_loops(body, inside=inside or repeats)
        elif code is regex.BRANCH:
            if inside:
                raise PatternError("a choice inside a repeat may take for ever to match")
            total += max(_num_loops(body, inside=inside) for body in argument[1])
        else:
            total += sum(_num_loops(body, inside=inside) for body in _bodies(argument))
    return total


def _bodies(argument: Any) -> list[Any]:
    """The sub-patterns within a node of Python's parse tree, whatever the node is."""
    if isinstance(argument, regex_parser.SubPattern):
        return [argument]
    if isinstance(argument, list | tuple):
        return [body for item in argument for body in _bodies(item)]
    return []
