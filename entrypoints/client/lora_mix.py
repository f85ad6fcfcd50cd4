"""Names several adapters, each with a weight, in one request."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from loraplex.engine.frontend.mixing.adapter_use import MAX_BINDINGS, checked_weight
from loraplex.entrypoints.client.lora_request import LoRARequest

Part = LoRARequest | str
"""An adapter with its folder, or a registered name."""


@dataclass(frozen=True, slots=True, init=False)
class LoRAMix:
    """A weighted sum of adapters: y = W x + sum of weight * scale * B A x.

    Equals PEFT's add_weighted_adapter with combination_type="cat", but nothing is merged: all
    requests share the adapters' pages, whatever the weights. The order has no part in the answer.

    Attributes:
        parts: adapters and weights, at most MAX_BINDINGS; no name is in it twice.
    """

    parts: tuple[tuple[LoRARequest, float], ...]

    def __init__(self, parts: Iterable[Part | tuple[Part, float]]) -> None:
        """`parts` are adapters with weights, or without: then the weight is 1.

        Raises:
            ValueError: a weight is 0 or not finite, a name comes twice, or there are too many.
            TypeError: a part is something else.
        """
        found = tuple(map(_part, parts))
        names = [adapter.lora_name for adapter, _ in found]
        if not 1 <= len(found) <= MAX_BINDINGS:
            raise ValueError(f"a mix has 1 to {MAX_BINDINGS} adapters, got {len(found)}")
        if len(set(names)) < len(names):
            raise ValueError(f"a mix names each adapter once, got {', '.join(names)}")
        object.__setattr__(self, "parts", found)

    @property
    def name(self) -> str:
        return "+".join(sorted(adapter.lora_name for adapter, _ in self.parts))

    def with_absolute_paths(self) -> "LoRAMix":
        """Returns the mix as the engine's processes need it, which may run in another folder."""
        return LoRAMix(
            (replace(adapter, lora_path=adapter.absolute_path), weight)
            for adapter, weight in self.parts
        )

    def to_wire(self) -> list[dict[str, Any]]:
        """Returns the field `adapters` of a "generate" message."""
        entries = []
        for adapter, weight in self.parts:
            entry: dict[str, Any] = {"name": adapter.lora_name, "weight": weight}
            if adapter.lora_path:
                entry |= {"path": os.fspath(adapter.lora_path)}
                entry |= {"load_inplace": adapter.load_inplace}
            entries.append(entry)
        return entries


LoRA = LoRARequest | LoRAMix
"""An adapter of a request, or a mix of several."""


def _part(given: Part | tuple[Part, float]) -> tuple[LoRARequest, float]:
    adapter, weight = given if isinstance(given, tuple) else (given, 1.0)
    if isinstance(adapter, str):
        adapter = LoRARequest(adapter)
    if not isinstance(adapter, LoRARequest):
        raise TypeError(f"a mix holds LoRARequests or names, got {adapter!r:.80}")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"the weight of adapter {adapter.lora_name!r} must be a number")
    checked_weight(float(weight))
    return adapter, float(weight)
