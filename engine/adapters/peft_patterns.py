"""Regular expressions from an adapter's configuration, matched in time linear in the input.

Whoever makes an adapter writes them. Python's own matcher backtracks, so a pattern such as
``(?:.?.?)*!`` would keep the process busy for ever. RE2 does not backtrack. It has no
backreferences and no lookaround; a pattern that needs them is refused.
"""

from typing import Protocol, cast

import re2

MAX_PATTERN_CHARS = 2048
MAX_PATTERNS = 1024
MAX_TOTAL_CHARS = 64 << 10
MAX_PATTERN_BYTES = 1 << 20  # memory of one compiled pattern


class Match(Protocol):
    def __getitem__(self, group: str) -> str: ...


class Pattern(Protocol):
    """A compiled regular expression, with the two methods of re.Pattern that PEFT's rules need."""

    def match(self, text: str) -> Match | None: ...

    def fullmatch(self, text: str) -> Match | None: ...


class PatternError(ValueError):
    """The pattern is invalid or too large, or RE2 has no such construct; the text says which."""


class PatternCompiler:
    """Compiles the patterns of one configuration, up to MAX_PATTERNS and MAX_TOTAL_CHARS."""

    def __init__(self) -> None:
        self._num_patterns = 0
        self._num_chars = 0
        self._options = re2.Options()
        self._options.log_errors = False
        self._options.max_mem = MAX_PATTERN_BYTES

    def compile(self, field: str, pattern: object, template: str = "{}") -> Pattern:
        """Compile `template` with its ``{}`` replaced by `pattern`.

        Raises:
            PatternError: names `field` and the reason.
        """
        if not isinstance(pattern, str):
            raise PatternError(f"{field}: a pattern must be text, got {pattern!r:.40}")
        if len(pattern) > MAX_PATTERN_CHARS:
            raise PatternError(f"{field}: a pattern is longer than {MAX_PATTERN_CHARS} characters")
        self._num_patterns += 1
        self._num_chars += len(pattern)
        if self._num_patterns > MAX_PATTERNS or self._num_chars > MAX_TOTAL_CHARS:
            raise PatternError(
                f"{field}: the configuration holds more than {MAX_PATTERNS} patterns or "
                f"{MAX_TOTAL_CHARS} characters of them"
            )
        try:
            self._compile(pattern)  # a pattern must be whole without the template's brackets
            return self._compile(template.replace("{}", pattern))
        except (re2.error, UnicodeError) as error:
            raise PatternError(
                f"{field}: cannot use the regular expression {pattern!r:.80}: {_reason(error)}"
            ) from None

    def _compile(self, pattern: str) -> Pattern:
        return cast(Pattern, re2.compile(pattern, self._options))


def _reason(error: Exception) -> str:
    """Returns RE2's own words, which name the construct."""
    words = error.args[0] if error.args else ""
    text = words.decode(errors="replace") if isinstance(words, bytes) else str(words)
    if "perl operator" in text or "escape sequence" in text or "group name" in text:
        return f"{text} (lookaround and backreferences are not supported)"
    return text
