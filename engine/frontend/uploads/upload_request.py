"""The message with which a client sends an adapter's tensors."""

import json
from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.adapters.tensors.memory_file import MemoryPlace
from loraplex.engine.frontend import field_checks

_NAME_CHARS = 256


def _config(value: Any) -> bytes:
    """Returns the JSON of an adapter_config.json."""
    if not isinstance(value, dict):
        raise TypeError(
            f"must be the map of adapter_config.json, got {field_checks.type_name(value)}"
        )
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"is not what adapter_config.json could hold: {error}") from None


def _memory(value: Any) -> MemoryPlace:
    """Returns where the tensors are."""
    if not isinstance(value, dict) or value.keys() != {"pid", "fd", "name"}:
        raise TypeError('must be a map with "pid", "fd" and "name"')
    pid, fd, name = value["pid"], value["fd"], value["name"]
    are_numbers = all(type(number) is int and 0 <= number < 1 << 31 for number in (pid, fd))
    if not are_numbers or not isinstance(name, str) or not name or len(name) > _NAME_CHARS:
        raise ValueError("pid and fd must be integers, and name a text")
    return MemoryPlace(pid, fd, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapterTensorsRequest:
    """Loads an adapter whose tensors come with the message, or lie in memory of this machine.

    Without `memory` the frames after the message are, one after another, a safetensors file.
    """

    request_id: str = field(
        metadata={"check": field_checks.text(field_checks.MAX_ID_CHARS, empty=False)}
    )
    name: str = field(metadata={"check": field_checks.adapter_name})
    config: bytes = field(metadata={"check": _config})
    memory: MemoryPlace | None = field(default=None, metadata={"check": _memory})
    tenant: str = field(
        default="", metadata={"check": field_checks.text(field_checks.MAX_ID_CHARS)}
    )
