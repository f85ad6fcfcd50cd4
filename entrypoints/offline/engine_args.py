"""Holds an engine's keywords; the classes are named as in vLLM."""

import argparse
import os
import typing
from collections.abc import Iterable
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.offline.options import LLMOptions, engine_config_of, option_defaults
from loraplex.entrypoints.offline.vllm_keywords import RENAMED, vllm_defaults

Parser = TypeVar("Parser", bound=argparse._ActionsContainer)

_NO_FLAG = ("adapters", "adapter_stores", "fair_share_weights")
_DEFAULTS = {"model": "", **vllm_defaults(), **option_defaults()}
_HINTS = {"model": str, **dict.fromkeys(RENAMED, int), **typing.get_type_hints(LLMOptions)}


def _field_of(default: Any) -> Any:
    if isinstance(default, dict | list):
        return field(default_factory=partial(copy, default))
    return field(default=default)


if TYPE_CHECKING:

    @dataclass
    class _EngineFields:
        model: str

        def __getattr__(self, name: str) -> Any: ...
else:
    _EngineFields = make_dataclass(
        "_EngineFields",
        [(name, _HINTS.get(name, Any), _field_of(value)) for name, value in _DEFAULTS.items()],
        init=False,
        repr=False,
    )


class EngineArgs(_EngineFields):
    """Holds a model and the keywords of LLM, each as an attribute.

    A dataclass: ``LLM(**asdict(EngineArgs(model)))`` works. It has the fields of LLMOptions and
    vLLM's keywords, with vLLM's defaults where a keyword is vLLM's alone.

    Raises:
        TypeError: a keyword is unknown; the message names the most similar one.
        ValueError: a value is out of range.
    """

    def __init__(self, model: str | os.PathLike[str] = "", **options: Any) -> None:
        for own in fields(self):
            default = own.default if own.default_factory is MISSING else own.default_factory()
            setattr(self, own.name, default)
        self.__dict__.update(options, model=os.fspath(model))
        self.create_engine_config()

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> typing.Self:
        """Returns the values of the flags that add_cli_args() has added."""
        names = (own.name for own in fields(cls))
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    @staticmethod
    def add_cli_args(parser: Parser) -> Parser:
        """Adds a flag for each keyword to a parser or a group of one, which it returns."""
        _add_flags(parser, (own.name for own in fields(EngineArgs) if own.name not in _NO_FLAG))
        return parser

    def create_engine_config(self, **_: Any) -> EngineConfig:
        """Returns the configuration of the engine. vLLM's other arguments are ignored."""
        options = dict(vars(self))
        return engine_config_of(options.pop("model"), options)

    def __repr__(self) -> str:
        given = {n: v for n, v in vars(self).items() if n == "model" or v != _DEFAULTS.get(n)}
        options = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}({options})"


class AsyncEngineArgs(EngineArgs):
    """Holds the keywords of an AsyncLLM."""

    @staticmethod
    def add_cli_args(parser: Parser, async_args_only: bool = False) -> Parser:
        """Adds the flags of EngineArgs, or only those that concern an AsyncLLM alone."""
        if async_args_only:
            _add_flags(parser, ["enable_log_requests"])
            return parser
        return EngineArgs.add_cli_args(parser)


def _add_flags(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    parts = typing.get_type_hints(EngineConfig).values()
    helps = {own.name: own.metadata.get("help", "") for part in parts for own in fields(part)}
    helps |= {alias: f"vLLM's name of {name}" for alias, name in RENAMED.items()}
    for name in names:
        default = _DEFAULTS[name]
        kind = _kind_of(_HINTS.get(name, type(default)))
        options: dict[str, Any] = {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        text = helps.get(name, "").replace("%", "%%") or argparse.SUPPRESS
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **options)


def _kind_of(hint: Any) -> type:
    """Returns the type of a flag's value; `int | None` is int, and None is text."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[0] if kinds else str
