"""An adapter of one request: its version, its weight, and the position from which it applies."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.scheduler.adapters.version import AdapterState, AdapterVersion

MAX_BINDINGS = 8
"""Adapters of one request."""


@dataclass(slots=True, eq=False)
class Binding:
    """Adds weight * scale * (x A) B to every token from `first_position` on."""

    version: AdapterVersion
    weight: float = 1.0
    first_position: int = 0


def not_ready(bindings: Iterable[Binding]) -> AdapterVersion | None:
    """Returns the first version whose files are not inspected, if there is one."""
    for binding in bindings:
        if binding.version.state is not AdapterState.READY:
            return binding.version
    return None


def distinct_versions(bindings: Iterable[Binding]) -> dict[str, AdapterVersion]:
    """Returns one version for each content hash, in order. Versions that are not READY are not in
    it."""
    return {b.version.content_hash: b.version for b in bindings if b.version.content_hash}


def weight_changes(bindings: Iterable[Binding]) -> list[tuple[int, str]]:
    """Returns what changes the weights of a sequence: (first position, key of adapter and weight).

    Requests with equal lists compute equal tokens with equal weights. The order of the bindings has
    no part in it.
    """
    return sorted((b.first_position, _key(b)) for b in bindings)


def _key(binding: Binding) -> str:
    content_hash, weight = binding.version.content_hash, binding.weight
    return content_hash if weight == 1 else f"{content_hash} * {weight!r}"


def last_occurrence(token_ids: "array[int]", sought: "array[int]") -> int:
    """Returns where `sought` begins for the last time in `token_ids`, -1 if it does not occur."""
    raw, item = token_ids.tobytes(), token_ids.itemsize
    at = raw.rfind(sought.tobytes())
    while at > 0 and at % item:
        at = raw.rfind(sought.tobytes(), 0, at + len(sought) * item - 1)
    return at // item if at >= 0 else -1
