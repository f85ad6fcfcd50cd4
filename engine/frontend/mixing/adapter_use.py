"""One adapter of a request, as a client names it."""

import math
import struct
from dataclasses import dataclass
from typing import Any

from loraplex.engine.frontend import field_checks
from loraplex.scheduler.adapters.binding import MAX_BINDINGS

MAX_PATH_CHARS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUse:
    """An entry of `adapters`; with a path the name must mean this folder."""

    name: str
    weight: float = 1.0
    path: str = ""
    load_inplace: bool = False


_CHECKS = {
    "name": field_checks.adapter_name,
    "weight": lambda value: _weight(value),
    "path": field_checks.text(MAX_PATH_CHARS),
    "load_inplace": field_checks.boolean,
}


def adapter_uses(value: Any) -> tuple[AdapterUse, ...]:
    """Checks the field `adapters` of a client's message; raises as field_checks do."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise TypeError('must be a list of maps like {"name": "legal", "weight": 0.7}')
    if not 1 <= len(value) <= MAX_BINDINGS:
        raise ValueError(f"must name 1 to {MAX_BINDINGS} adapters, got {len(value)}")
    uses = tuple(map(_use, value))
    names = [use.name for use in uses]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"names {name!r} twice: add the weights up and name it once")
    return uses


def _use(entry: dict[Any, Any]) -> AdapterUse:
    unknown = [key for key in entry if key not in _CHECKS]
    if unknown:
        known = ", ".join(_CHECKS)
        raise ValueError(f"an entry takes {known}, not {field_checks.short(unknown[0])}")
    if "name" not in entry:
        raise ValueError("each entry needs a name")
    return AdapterUse(**{key: _CHECKS[key](given) for key, given in entry.items()})


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a weight must be a number, got {field_checks.type_name(value)}")
    return checked_weight(float(value))


def checked_weight(weight: float) -> float:
    """Returns the weight as float32 holds it.

    Raises:
        ValueError: it is 0, infinite or NaN, also if only after rounding.
    """
    try:
        (rounded,) = struct.unpack("f", struct.pack("f", weight))
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded) or rounded == 0:
        raise ValueError(
            f"a weight must be finite in float32 and not 0, got {weight!r}; "
            "leave out an adapter that has no part"
        )
    return float(rounded)
