"""Offers EngineArgs and AsyncEngineArgs where vLLM has them.

They belong to the package's public names, which this folder must not import when it is loaded.
"""

from importlib import import_module
from typing import Any

_NAMES = ("AsyncEngineArgs", "EngineArgs")


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("loraplex"), name)
