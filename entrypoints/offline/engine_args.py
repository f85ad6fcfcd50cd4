"""Holds an engine's keywords; the classes are named as in vLLM."""

import os
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.offline.options import engine_config_of


class EngineArgs:
    """Holds a model and the keywords of LLM, each as an attribute.

    Raises:
        TypeError: a keyword is unknown; the message names the most similar one.
        ValueError: a value is out of range.
    """

    def __init__(self, model: str | os.PathLike[str] = "", **options: Any) -> None:
        self.__dict__.update(options, model=os.fspath(model))
        self.create_engine_config()

    def create_engine_config(self) -> EngineConfig:
        """Returns the configuration of the engine."""
        options = dict(vars(self))
        return engine_config_of(options.pop("model"), options)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


class AsyncEngineArgs(EngineArgs):
    """Holds the keywords of an AsyncLLM."""
