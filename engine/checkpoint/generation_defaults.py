"""Reads the sampling parameters that a model's makers recommend."""

import json
import math
from pathlib import Path

from loraplex.engine.errors import ConfigError

_FILE = "generation_config.json"
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
_PACKAGED = {"temperature": 0.2, "top_p": 0.9}
"""The model card of SmolLM2-135M-Instruct. A GGUF file holds no such values."""


def generation_defaults(model: str) -> dict[str, float | int]:
    """Returns fields of SamplingParams, as vLLM takes them from generation_config.json.

    Args:
        model: a model's folder or file; empty: the packaged model.

    Raises:
        ConfigError: the file is damaged.
    """
    if not model:
        return dict(_PACKAGED)
    path = Path(model).expanduser() / _FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    found: dict[str, float | int] = {
        name: float(values[name]) for name in _FLOATS if _is_number(values.get(name))
    }
    for name, field in (("top_k", "top_k"), ("max_new_tokens", "max_tokens")):
        if _is_number(values.get(name)):
            found[field] = int(values[name])
    return found


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
