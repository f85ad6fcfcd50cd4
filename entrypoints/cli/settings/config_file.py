"""Turns a configuration file into the flags that it stands for.

A file is a YAML map from names of flags to values. All values are taken as texts, so that a flag's
own type checks them. Errors are ConfigErrors that name the file and the line.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.cli.flag_hints import explain
from loraplex.entrypoints.cli.settings.repeated import Repeated

_BOOLEANS = {
    "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False,
}  # fmt: skip
_NOT_IN_FILES = ("--config", "--help")

Value = str | list[str] | dict[str, str]


def arguments_of(path: str, actions: Mapping[str, argparse.Action]) -> list[str]:
    """Returns flags and their values, for a parser with these `actions` by option string.

    Raises:
        ConfigError: the file cannot be read, is no map, has an unknown name or one name twice, or a
            value has a form that its flag does not take.
    """
    known = {
        name: action
        for name, action in actions.items()
        if name.startswith("--") and not name.startswith("--no-") and name not in _NOT_IN_FILES
    }
    arguments: list[str] = []
    seen: set[str] = set()
    for where, key, value in _entries(path):
        flag = "--" + key.replace("_", "-")
        if flag not in known:
            hint = explain([flag], known).removeprefix(f"unrecognized argument {flag}")
            raise ConfigError(f"{where}: unknown name {key!r}{hint}")
        if flag in seen:
            raise ConfigError(f"{where}: {key!r} is there twice")
        seen.add(flag)
        arguments += _arguments(where, key, flag, known[flag], value)
    return arguments


def _arguments(where: str, key: str, flag: str, action: argparse.Action, value: Value) -> list[str]:
    if isinstance(action, Repeated):
        pairs = value.items() if isinstance(value, dict) else ()
        items = value if isinstance(value, list) else [f"{name}={text}" for name, text in pairs]
        return [f"{flag}={item}" for item in ([value] if isinstance(value, str) else items)]
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {key} takes one value")
    if action.nargs != 0:
        return [f"{flag}={value}"]
    is_on = _BOOLEANS.get(value.lower())
    if is_on is None:
        raise ConfigError(f"{where}: {key} must be true or false, got {value!r:.40}")
    negation = "--no-" + flag.removeprefix("--")
    return [flag] if is_on else [negation] if negation in action.option_strings else []


def _entries(path: str) -> Iterator[tuple[str, str, Value]]:
    """Yields the place, the name and the value of each entry."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            node = yaml.compose(file, Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line} is not YAML: {error.problem}") from None
    if node is None:
        return  # an empty file
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} must be a map from names of flags to values")
    for key, value in node.value:
        yield f"{path}:{key.start_mark.line + 1}", _text(path, key), _value(path, value)


def _value(path: str, node: Any) -> Value:
    if node.id == "sequence":
        return [_text(path, item) for item in node.value]
    if node.id == "mapping":
        return {_text(path, name): _text(path, item) for name, item in node.value}
    return _text(path, node)


def _text(path: str, node: Any) -> str:
    if node.id != "scalar":
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: lists and maps may hold texts and numbers only"
        )
    return str(node.value)
