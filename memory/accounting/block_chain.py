"""Chained hashes of a request's blocks, and who hears of those that are cached.

A block's hash depends on everything its KV depends on: base model, all tokens up to its end, and
the adapters that have begun to apply by its end, with their weights and first positions; and on
tenant and salt.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

_DIGEST_BYTES = 32


def prefix_root(*, tenant: str, salt: str, base_fingerprint: str) -> bytes:
    """Return the start of a hash chain."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for text in (tenant, salt, base_fingerprint):
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()


class BlockLabel(NamedTuple):
    """Describes the blocks of a request to an observer."""

    adapter: str = ""  # its name; empty: the base model
    first_position: int = 0  # from which the adapter applies
    tenant: str = ""
    salt: str = ""


NO_LABEL = BlockLabel()


class BlockChain:
    """Chained hashes of one request's full blocks.

    `hashes[i]` covers tokens 0 to (i + 1) * block_tokens - 1. Tokens are only appended, so a chain
    stays valid through preemptions.

    Attributes:
        label: says to an observer whose blocks these are.
    """

    __slots__ = ("_block_tokens", "_changes", "_num_changing", "_root", "hashes", "label")

    def __init__(
        self,
        root: bytes,
        block_tokens: int,
        changes: Sequence[tuple[int, str]] = (),
        label: BlockLabel = NO_LABEL,
    ) -> None:
        """`changes` are the adapters: (first position, key) in order; none: the base model."""
        self.label = label
        self._root = root
        self._block_tokens = block_tokens
        self._changes = changes
        self._num_changing = changes[-1][0] // block_tokens + 1 if changes else 0
        self.hashes: list[bytes] = []

    def extend(self, token_ids: "array[int]", num_blocks: int) -> None:
        """Hash the blocks up to `num_blocks`; `token_ids` (int32) holds all their tokens."""
        hashes, size = self.hashes, self._block_tokens
        previous = hashes[-1] if hashes else self._root
        for block in range(len(hashes), num_blocks):
            raw = token_ids[block * size : (block + 1) * size].tobytes()
            if block < self._num_changing:
                raw += self._changes_in(block)
            previous = hashlib.blake2b(previous + raw, digest_size=_DIGEST_BYTES).digest()
            hashes.append(previous)

    def _changes_in(self, block: int) -> bytes:
        """Return the adapters that begin to apply in a block, and at which of its tokens."""
        parts: list[bytes] = []
        for position, key in self._changes:
            if position // self._block_tokens == block:
                raw = key.encode("utf-8", "surrogatepass")
                offset = position % self._block_tokens
                parts += (offset.to_bytes(8, "little"), len(raw).to_bytes(8, "little"), raw)
        return b"".join(parts)


class BlockObserver(Protocol):
    """Hears of the blocks in the prefix cache."""

    def on_stored(self, chain: BlockChain, block: int, token_ids: "array[int]") -> None:
        """Block number `block` of the chain is cached; `token_ids` (int32) holds its tokens."""

    def on_removed(self, key: bytes) -> None:
        """The block with this hash is cached no longer."""

    def on_cleared(self) -> None:
        """No block is cached."""
