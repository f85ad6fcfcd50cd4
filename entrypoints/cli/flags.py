"""Generates command-line flags from the fields of the configuration dataclasses.

A flag that was not given is absent from the parsed namespace, so every default lives in its
dataclass and nowhere else.
"""

import argparse
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from loraplex.backends import registry
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.cli.flag_hints import explain
from loraplex.entrypoints.cli.flag_types import (
    format_size,
    parse_bias,
    parse_ints,
    parse_pair,
    parse_size,
)
from loraplex.entrypoints.cli.settings.config_file import arguments_of
from loraplex.entrypoints.cli.settings.repeated import Repeated

GROUPS = {
    "model": "model",
    "adapter": "adapters",
    "store": "adapter stores",
    "memory": "memory (one pool of pages for KV cache and adapters)",
    "scheduler": "scheduler",
    "backend": "backends",
    "parallel": "several GPUs",
    "process": "processes",
    "graph": "CUDA graphs",
    "profile": "profiling",
    "server": "server",
}
"""Titles in --help, by part of EngineConfig."""

OFFLINE_HIDDEN = ("server", "adapter_root", "max_adapters_per_tenant")
"""Parts and fields that matter only where other clients can connect."""

SAMPLING_HIDDEN = (
    "seed", "detokenize", "output_kind", "allowed_token_ids", "bad_words", "structured_outputs",
)  # fmt: skip
"""Fields without a flag. `--seed` sets the engine's seed, which requests without one take."""

SAMPLING_DEFAULTS = {"max_tokens": 256}

SAMPLING_HELP = {
    "n": "answers to each prompt",
    "presence_penalty": "lowers tokens already in the answer, once each",
    "frequency_penalty": "lowers tokens already in the answer, by how often",
    "repetition_penalty": "above 1 lowers tokens already in prompt or answer",
    "temperature": "0 always takes the most likely token; without the flag, the value in the "
    "model's generation_config.json goes before the default",
    "top_p": "smallest set of tokens with this much probability",
    "top_k": "number of most likely tokens to draw from; 0: all",
    "min_p": "least probability of a token, as a share of the most likely one's",
    "stop": "end the answer at this text; may be repeated",
    "stop_token_ids": "end the answer at any of these tokens, as 1,2,3",
    "ignore_eos": "continue past the end-of-sequence token",
    "max_tokens": "longest answer, in tokens",
    "min_tokens": "shortest answer, in tokens",
    "logprobs": "report this many most likely tokens at each position",
    "prompt_logprobs": "report this many most likely tokens at each position of the prompt",
    "skip_special_tokens": "leave special tokens out of the text",
    "include_stop_str_in_output": "keep the stop text in the answer",
    "logit_bias": "TOKEN_ID=VALUE added to that token's logit; may be repeated",
}


class FlagParser(argparse.ArgumentParser):
    """A parser without abbreviations, so that a new flag never changes what a script means.

    An unknown flag is an error that names the most similar one. Flags of the command line go before
    those of the file that --config names, if there is such a flag.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._file = ""  # that is being read

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if "--config" in self._option_string_actions:
            namespace = self._values_of_file(args, namespace)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(explain(unknown, self._option_string_actions))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        super().error(f"{self._file}: {message}" if self._file else message)

    def _values_of_file(
        self, args: Sequence[str] | None, namespace: argparse.Namespace | None
    ) -> argparse.Namespace | None:
        """Returns the namespace with what the file sets, and the defaults of other flags."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", default="")
        path = finder.parse_known_args(args)[0].config
        if not path:
            return namespace
        try:
            arguments = arguments_of(path, self._option_string_actions)
        except ConfigError as error:
            self.error(str(error))
        self._file = path
        namespace, _ = super().parse_known_args(arguments, namespace)
        self._file = ""
        for action in self._actions:
            if isinstance(action, Repeated) and hasattr(namespace, action.dest):
                setattr(namespace, action.dest, tuple(getattr(namespace, action.dest)))
        return namespace


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
    """Add one group of flags for the fields of a dataclass.

    Args:
        hidden: names of fields that get no flag.
        helps: help texts of fields that carry none in their metadata.
        defaults: defaults shown in --help instead of the dataclass's own; the caller applies them.
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


def add_engine_flags(
    parser: argparse.ArgumentParser, *, offline: bool, hidden: Sequence[str] = ()
) -> None:
    """Add a group for each part of EngineConfig; `offline` leaves out what concerns clients.

    `hidden` names more parts and fields that get no flags.
    """
    hidden = (*hidden, *(OFFLINE_HIDDEN if offline else ()))
    parts = typing.get_type_hints(EngineConfig)
    for name, title in GROUPS.items():
        if name not in hidden:
            add_flags(parser, parts[name], title=title, hidden=hidden)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with values for flags, by their names; the command line goes before it",
    )
    # vLLM's names. Adapters are always enabled.
    hide: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--enable-lora", action="store_true", **hide)
    parser.add_argument("--max-loras", dest="max_adapter_slots", type=int, **hide)


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
    """Build the configuration that the flags describe.

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


def sampling_params_of(
    args: argparse.Namespace, model_defaults: Mapping[str, float] | None = None
) -> SamplingParams:
    """Build the sampling parameters that the flags describe.

    Args:
        model_defaults: values of fields whose flags were not given.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """
    given = values_of(args, SamplingParams, SAMPLING_HIDDEN)
    values = {**(model_defaults or {}), **SAMPLING_DEFAULTS, **given}
    try:
        return SamplingParams(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None


def values_of(args: argparse.Namespace, cls: type, hidden: Iterable[str] = ()) -> dict[str, Any]:
    """Values of the fields of `cls` whose flags were given, by field name."""
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
    """Keywords of add_argument for a field of this type."""
    hint = _without_none(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    op = field.name.removesuffix("_backend")
    if op in registry.OPS:
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
        tuple[str, ...]: (str, field.metadata.get("metavar", "TEXT")),
    }
    if hint in repeated:
        convert, metavar = repeated[hint]
        return {"action": Repeated, "type": convert, "metavar": metavar}
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
