"""The user's structured output settings; names and meanings are vLLM's."""

import json as json_codec
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from loraplex.engine.frontend.field_checks import short
from loraplex.scheduler.frontend_protocol import GrammarSpec

MAX_GRAMMAR_CHARS = 1 << 16
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_ENTRIES = 4096  # keys and items of all objects and lists in a schema
MAX_CHOICES = 1024

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(slots=True, kw_only=True)
class StructuredOutputsParams:
    """Restricts an answer to a form. Exactly one of the first five fields is set.

    Raises:
        ValueError: none or several are set, or one is too large; the message names it.
        TypeError: a field is of the wrong type.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema, as a map or as text
    regex: str | None = None  # the whole answer matches it
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, or GBNF
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # between the parts of JSON
    whitespace_pattern: str | None = None  # a regex of what may stand between the parts of JSON

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must set exactly one of {', '.join(_KINDS)}, got "
                f"{' and '.join(given) or 'none'}"
            )
        _check_types(self)
        if isinstance(self.json, dict):
            check_schema(self.json)
        self.to_grammar()  # refuses what is too large

    @classmethod
    def from_wire(cls, values: Any) -> "StructuredOutputsParams":
        """Builds the settings from a decoded map.

        Raises:
            ValueError, TypeError: as the constructor; an unknown name lists the known ones.
        """
        if not isinstance(values, dict):
            raise TypeError(f"structured_outputs must be a map, got {short(values)}")
        known = [f.name for f in fields(cls)]
        unknown = list(islice((short(k) for k in values if k not in known), 5))
        if unknown:
            raise ValueError(
                f"structured_outputs does not take {', '.join(unknown)}; it takes "
                f"{', '.join(known)}"
            )
        return cls(**values)

    def to_wire(self) -> dict[str, Any]:
        """Returns the fields that are set."""
        return {
            f.name: value
            for f in fields(self)
            if (value := getattr(self, f.name)) not in (None, False)
        }

    def to_grammar(self, min_tokens: int = 0) -> GrammarSpec:
        """Returns the grammar to compile.

        Raises:
            ValueError: it is too large, or the JSON schema is not JSON.
        """
        kind, text = self._kind_and_text()
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ValueError(
                f"structured_outputs: the {kind} has {len(text)} characters, more than "
                f"{MAX_GRAMMAR_CHARS}: make it smaller"
            )
        return GrammarSpec(
            kind=kind,
            text=text,
            is_compact=self.disable_any_whitespace,
            whitespace=self.whitespace_pattern or "",
            min_tokens=min_tokens,
        )

    def _kind_and_text(self) -> tuple[str, str]:
        if self.json is not None:
            schema = _parse_schema(self.json) if isinstance(self.json, str) else self.json
            return "json", json_codec.dumps(schema)
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            options = (json_codec.dumps(text, ensure_ascii=False) for text in self.choice)
            return "lark", f"start: {' | '.join(options)}"
        return "gbnf" if "::=" in (self.grammar or "") else "lark", self.grammar or ""


def _parse_schema(text: str) -> dict[str, Any]:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(
            f"structured_outputs: the json has {len(text)} characters, more than "
            f"{MAX_GRAMMAR_CHARS}: make the schema smaller"
        )
    try:
        schema = json_codec.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs: json is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise TypeError(f"structured_outputs: json must be a JSON schema, got {short(schema)}")
    check_schema(schema)
    return schema


def check_schema(schema: dict[str, Any]) -> None:
    """Raises ValueError if a schema is too deep or too large, TypeError if it is not of JSON."""
    num_entries, level = 0, [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if not all(isinstance(key, str) for key in value):
                    raise TypeError("structured_outputs: json must have strings as keys")
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif not isinstance(value, str | int | float | bool | None):
                raise TypeError(f"structured_outputs: json holds {short(value)}, which is not JSON")
        num_entries += len(below)
        if num_entries > MAX_SCHEMA_ENTRIES:
            raise ValueError(
                f"structured_outputs: the schema has more than {MAX_SCHEMA_ENTRIES} entries: make "
                "it smaller"
            )
        if not below:
            return
        level = below
    raise ValueError(
        f"structured_outputs: the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep: use "
        "$defs and $ref"
    )


def _check_types(params: StructuredOutputsParams) -> None:
    if params.json is not None and not isinstance(params.json, str | dict):
        raise TypeError(f"json must be a JSON schema, got {short(params.json)}")
    for name in ("regex", "grammar", "whitespace_pattern"):
        value = getattr(params, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {short(value)}")
        if value == "":
            raise ValueError(f"{name} must not be empty")
    for name in ("json_object", "disable_any_whitespace"):
        value = getattr(params, name)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {short(value)}")
    choice = params.choice
    if choice is None:
        return
    if not isinstance(choice, list | tuple) or not all(isinstance(text, str) for text in choice):
        raise TypeError("choice must be a list of strings")
    if not all(choice):
        raise ValueError("choice must hold at least one text, and none that is empty")
    if not 1 <= len(choice) <= MAX_CHOICES:
        raise ValueError(f"choice must hold 1 to {MAX_CHOICES} texts, got {len(choice)}")
