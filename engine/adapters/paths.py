"""Finds the adapters that are named at start, and checks the paths that clients send."""

import os
import re

from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import ConfigError, client_error

ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_NAME = re.compile(r"\w[\w.:/@+-]{0,199}")


def adapters_at_start(config: AdapterConfig) -> list[tuple[str, str]]:
    """Returns (name, real path) of every adapter that the configuration names.

    Raises:
        ConfigError: a path is no PEFT directory, or a name is malformed or given twice.
    """
    found = [(name, os.path.realpath(os.path.expanduser(path))) for name, path in config.adapters]
    for name, path in found:
        if not os.path.isdir(path):
            raise ConfigError(f"adapter {name!r}: {path} is no directory")
        if not _is_peft_directory(path):
            raise ConfigError(f"adapter {name!r}: {path} holds no {ADAPTER_FILE}{_hint(path)}")
    if config.adapter_dir:
        found += _peft_directories(os.path.abspath(os.path.expanduser(config.adapter_dir)))
    seen: dict[str, str] = {}
    for name, path in found:
        if not ADAPTER_NAME.fullmatch(name):
            raise ConfigError(
                f"adapter name {name!r}: letters, digits and . _ : / @ + - only, at most 200"
            )
        if seen.setdefault(name, path) != path:
            raise ConfigError(f"adapter {name!r} is given twice: {seen[name]} and {path}")
    return list(seen.items())


def _peft_directories(folder: str) -> list[tuple[str, str]]:
    if not os.path.isdir(folder):
        raise ConfigError(f"adapter_dir {folder} is no directory")
    if _is_peft_directory(folder):
        raise ConfigError(
            f"adapter_dir {folder} is an adapter itself: give it as "
            f"--adapter {os.path.basename(folder)}={folder}, or name the folder above it"
        )
    found = _adapters_in(folder)
    if not found:
        raise ConfigError(
            f"adapter_dir {folder} holds no folder with an {ADAPTER_FILE}: name the folder whose "
            "subfolders are adapters, or leave adapter_dir out"
        )
    return found


def _adapters_in(folder: str) -> list[tuple[str, str]]:
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return [(os.path.basename(p), os.path.realpath(p)) for p in paths if _is_peft_directory(p)]


def _hint(path: str) -> str:
    if os.path.isfile(os.path.join(path, "config.json")):
        return "; it is a whole model: give it as --model"
    if _adapters_in(path):
        return "; it is a folder of adapters: give it as --adapter-dir"
    return ""


def _is_peft_directory(path: str) -> bool:
    return os.path.isfile(os.path.join(path, ADAPTER_FILE))


def expanded(root: str) -> str:
    """Returns the real path of `root`, "" for an empty one."""
    return os.path.realpath(os.path.expanduser(root)) if root else ""


def check_under_root(path: str, root: str) -> str:
    """Returns the real path of a directory under `root`, after following symbolic links.

    Raises:
        ClientError: "forbidden" outside the root, whether the path exists or not; "adapter" if it
            is no directory.
    """
    if not root:
        raise client_error(
            "forbidden", "this server loads no adapters for clients (no adapter_root is configured)"
        )
    real_root = expanded(root)
    if "\0" in path:
        raise client_error("forbidden", "the path holds a null character")
    real = os.path.realpath(os.path.join(real_root, path))
    if os.path.commonpath((real, real_root)) != real_root:
        raise client_error("forbidden", "the path lies outside the server's adapter_root")
    if not os.path.isdir(real):
        raise client_error("adapter", f"{path[:200]} is no directory")
    return real
