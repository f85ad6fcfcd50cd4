"""Random schemas, regexes and choices, each with a check that knows nothing of grammars."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

from loraplex import StructuredOutputsParams

WORDS = ("red", "green", "blue", "yes", "no", "maybe so", "Paris", "42", "ünï")


@dataclass(frozen=True)
class Form:
    """Holds what is asked for and a function that names the fault of an answer, "" for none."""

    params: StructuredOutputsParams
    fault: Callable[[str], str]


def random_form(rng: random.Random) -> Form:
    """Returns a form whose every text is short, so that an answer ends by itself."""
    kind = rng.choice(("json", "json", "regex", "choice"))
    if kind == "json":
        schema = random_schema(rng, depth=2)
        params = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
        return Form(params, lambda text: schema_fault(text, schema))
    if kind == "regex":
        pattern = random_regex(rng)
        return Form(
            StructuredOutputsParams(regex=pattern),
            lambda text: "" if re.fullmatch(pattern, text) else f"{text!r} against {pattern}",
        )
    choice = rng.sample(WORDS, rng.randint(1, 5))
    return Form(
        StructuredOutputsParams(choice=choice),
        lambda text: "" if text in choice else f"{text!r} is none of {choice}",
    )


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    scalars: list[dict[str, Any]] = [
        {"type": "integer", "minimum": rng.randint(-99, 0), "maximum": rng.randint(1, 9999)},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": rng.sample(WORDS, 3)},
        {"const": rng.choice(WORDS)},
        {"type": "string", "maxLength": rng.randint(0, 8)},
        {"type": "string", "pattern": "^[a-c]{1,4}$"},
    ]
    if not depth or rng.random() < 0.3:
        return rng.choice(scalars)
    below = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    match rng.randrange(3):
        case 0:
            return {"type": "array", "items": below[0], "minItems": 1, "maxItems": 3}
        case 1:
            return {"anyOf": below}
    names = [f"key{i}" for i in range(len(below))]
    return {
        "type": "object",
        "properties": dict(zip(names, below, strict=True)),
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def schema_fault(text: str, schema: dict[str, Any]) -> str:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r} against {schema}: {error}"
    return ""


def random_regex(rng: random.Random) -> str:
    parts = (
        "[a-f]{2,4}",
        r"\d{1,3}",
        "(yes|no)",
        "-",
        "x?",
        '[^\\n"]{1,5}',
        "é",
        r"\.",
        "(ab){1,2}",
    )
    return "".join(rng.choice(parts) for _ in range(rng.randint(1, 5))) + "!"
