"""Rendezvous (highest random weight) hashing: Thaler and Ravishankar, 1998."""

from collections.abc import Iterable
from hashlib import blake2b


def rank_engines(content_hash: str, engine_ids: Iterable[str]) -> list[str]:
    """Returns the engines in the adapter's order of preference.

    The order of any two engines does not depend on the others, so an engine that leaves moves only
    the adapters that preferred it.
    """
    return sorted(engine_ids, key=lambda engine_id: _weight(content_hash, engine_id), reverse=True)


def _weight(content_hash: str, engine_id: str) -> bytes:
    return blake2b(f"{content_hash}\0{engine_id}".encode(), digest_size=8).digest()
