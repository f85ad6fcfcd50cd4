"""Command-line flags, generated from the fields of the configuration dataclasses.

A flag that was not given leaves no trace in the parsed namespace, so every default lives in
its dataclass and nowhere else.
"""

import argparse
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from loraplex.backends import registry
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.sampling_params import SamplingParams

GROUPS = {
    "model": "model",
    "adapter": "adapters",
    "memory": "memory (one pool of pages for KV cache and adapters)",
    "scheduler": "scheduler",
    "backend": "backends",
    "graph": "CUDA graphs",
    "profile": "profiling",
    "server": "server",
}
"""Title in --help of each part of EngineConfig. `num_workers` becomes a flag when it may vary."""

OFFLINE_HIDDEN = ("server", "adapter_root")
"""Parts and fields that mean nothing where no client but the command itself can connect."""

SAMPLING_HIDDEN = ("seed", "detokenize")
"""`--seed` is the engine's, which seeds every request that names no seed of its own."""

SAMPLING_DEFAULTS = {"max_tokens": 256}

SAMPLING_HELP = {
    "n": "answers to each prompt",
    "presence_penalty": "lowers tokens already in the answer, once each",
    "frequency_penalty": "lowers tokens already in the answer, by how often",
    "repetition_penalty": "above 1 lowers tokens already in prompt or answer",
    "temperature": "0 always takes the most likely token",
    "top_p": "smallest set of tokens with this much probability",
    "top_k": "number of most likely tokens to draw from; 0: all",
    "min_p": "least probability of a token, as a share of the most likely one's",
    "stop": "end the answer at this text; may be repeated",
    "stop_token_ids": "end the answer at any of these tokens, as 1,2,3",
    "ignore_eos": "go on past the end-of-sequence token",
    "max_tokens": "longest answer, in tokens",
    "min_tokens": "shortest answer, in tokens",
    "logprobs": "report this many most likely tokens at each position",
    "prompt_logprobs": "the same for the prompt's positions",
    "skip_special_tokens": "leave special tokens out of the text",
    "include_stop_str_in_output": "keep the stop text in the answer",
    "logit_bias": "TOKEN_ID=VALUE added to that token's logit; may be repeated",
}

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
    """NAME=VALUE, both present."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} should read NAME=VALUE")
    return name, value


def parse_bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should read TOKEN_ID=VALUE") from None


def parse_ints(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should read like 1,2,3") from None


class FlagParser(argparse.ArgumentParser):
    """No abbreviations: a later flag must never change what a script's shortened one meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def flag_of(field: Field[Any]) -> str:
    return str(field.metadata.get("flag", "--" + field.name.replace("_", "-")))


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    title: str,
    hidden: Iterable[str] = (),
    helps: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """One group of flags for the fields of a dataclass.

    Args:
        helps: help of fields that carry none in their metadata.
        defaults: values to show, and to apply in `values_of`, instead of the dataclass's own.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if field.name in hidden:
            continue
        help_text = str(field.metadata.get("help") or (helps or {})[field.name])
        default = (defaults or {}).get(field.name, _default_of(field))
        group.add_argument(
            flag_of(field),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=_help_with_default(field, help_text, default),
            **_argument_kind(field, hints[field.name]),
        )


def add_engine_flags(parser: argparse.ArgumentParser, *, offline: bool) -> None:
    """A group for each part of EngineConfig; `offline` leaves out what concerns clients."""
    hidden = OFFLINE_HIDDEN if offline else ()
    parts = typing.get_type_hints(EngineConfig)
    for name, title in GROUPS.items():
        if name not in hidden:
            add_flags(parser, parts[name], title=title, hidden=hidden)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(
        parser,
        SamplingParams,
        title="sampling",
        hidden=SAMPLING_HIDDEN,
        helps=SAMPLING_HELP,
        defaults=SAMPLING_DEFAULTS,
    )


def engine_config_of(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the flags describe.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """
    parts = typing.get_type_hints(EngineConfig)
    try:
        return EngineConfig(
            **{name: parts[name](**values_of(args, parts[name])) for name in GROUPS}
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def sampling_params_of(args: argparse.Namespace) -> SamplingParams:
    """Raises ConfigError like engine_config_of."""
    values = {**SAMPLING_DEFAULTS, **values_of(args, SamplingParams, SAMPLING_HIDDEN)}
    try:
        return SamplingParams(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None


def values_of(args: argparse.Namespace, cls: type, hidden: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of `cls` whose flags were given."""
    values = {}
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if field.name in hidden or not hasattr(args, field.name):
            continue
        value = getattr(args, field.name)
        kind = typing.get_origin(_without_none(hints[field.name]))
        values[field.name] = kind(value) if kind in (tuple, dict) else value
    return values


def _argument_kind(field: Field[Any], hint: Any) -> dict[str, Any]:
    """argparse's keywords for a field of this type."""
    hint = _without_none(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if field.name in ("lora_backend", "attention_backend", "fused_backend"):
        op = field.name.removesuffix("_backend")
        return {"choices": [registry.AUTO, *(b.name for b in registry.list_backends(op))]}
    if "choices" in field.metadata:
        return {"choices": list(field.metadata["choices"])}
    if hint is int and field.name.endswith("_bytes"):
        return {"type": parse_size, "metavar": "BYTES"}
    scalar: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (int, "N"), float: (float, "X"), str: (str, _metavar(field)),
    }  # fmt: skip
    if hint in scalar:
        convert, metavar = scalar[hint]
        return {"type": convert, "metavar": metavar}
    repeated: dict[Any, tuple[Callable[[str], Any], str]] = {
        tuple[tuple[str, str], ...]: (parse_pair, field.metadata.get("metavar", "NAME=PATH")),
        dict[int, float]: (parse_bias, "ID=X"),
        str | list[str]: (str, "TEXT"),
    }
    if hint in repeated:
        convert, metavar = repeated[hint]
        return {"action": "append", "type": convert, "metavar": metavar}
    if hint == list[int]:
        return {"type": parse_ints, "metavar": "IDS"}
    raise TypeError(f"no flag can be made for {field.name}: {hint}")


def _metavar(field: Field[Any]) -> str:
    if field.name == "endpoint":
        return "URL"
    return "DIR" if field.name.endswith(("_dir", "_root")) else "PATH"


def _without_none(hint: Any) -> Any:
    """`int` for `int | None`; `str | list[str]` for that or None."""
    if not isinstance(hint, types.UnionType):
        return hint
    rest = [part for part in typing.get_args(hint) if part is not type(None)]
    result = rest[0]
    for part in rest[1:]:
        result = result | part
    return result


def _default_of(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _help_with_default(field: Field[Any], text: str, default: Any) -> str:
    text = text.replace("%", "%%")
    if default in (None, "", ()):
        return text
    if isinstance(default, bool):
        default = "yes" if default else "no"
    elif field.name.endswith("_bytes"):
        default = format_size(default)
    return f"{text} (default: {default})"
