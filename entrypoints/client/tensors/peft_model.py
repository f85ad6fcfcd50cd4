"""Takes configuration and tensors from PEFT's objects."""

from collections.abc import Mapping
from enum import Enum
from typing import Any


def config_map(config: Any) -> dict[str, Any]:
    """Returns what adapter_config.json would hold.

    Args:
        config: a PeftConfig, or a map of its fields.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(f"config must be a map or a PeftConfig, got {type(config).__name__}")
        config = config.to_dict()
    return {str(name): _plain(value) for name, value in config.items()}


def peft_parts(model: Any, adapter: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the configuration and the tensors of one adapter of a PeftModel.

    Args:
        adapter: PEFT's name of it; the active one if None.

    Raises:
        TypeError: `model` is no PeftModel.
        ValueError: it has no such adapter, or several are active.
    """
    if not hasattr(model, "peft_config"):
        raise TypeError(f"a PeftModel was expected, got {type(model).__name__}")
    from peft import get_peft_model_state_dict

    name = _active(model) if adapter is None else adapter
    if name not in model.peft_config:
        known = ", ".join(model.peft_config)
        raise ValueError(f"the model has no adapter {name!r}; it has {known}")
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return config_map(model.peft_config[name]), tensors


def _active(model: Any) -> str:
    active = getattr(model, "active_adapters", None) or [model.active_adapter]
    if len(active) != 1:
        raise ValueError(f"the adapters {', '.join(active)} are active: name one of them")
    return str(active[0])


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    return value
