"""Collects the events of the prefix cache until they are published."""

from array import array

from loraplex.engine.kv_events.events import (
    GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
)
from loraplex.memory.accounting.block_chain import BlockChain


class KVEventRecorder:
    """Implements BlockObserver."""

    def __init__(self, block_tokens: int) -> None:
        self._size = block_tokens
        self._events: list[KVEvent] = []

    def take(self) -> list[KVEvent]:
        """Returns the events since the last call, in their order."""
        events, self._events = self._events, []
        return events

    def on_stored(self, chain: BlockChain, block: int, token_ids: "array[int]") -> None:
        key, label = chain.hashes[block], chain.label
        start, end = block * self._size, (block + 1) * self._size
        parent = chain.hashes[block - 1] if block else None
        name = label.adapter if label.first_position < end else ""
        extra = tuple(filter(None, (name, *((label.salt, label.tenant) if not block else ()))))
        last = self._events[-1] if self._events else None
        if (
            not isinstance(last, BlockStored)
            or last.block_hashes[-1] != parent
            or last.lora_name != (name or None)
        ):
            last = BlockStored([], parent, [], self._size, None, GPU, name or None, [])
            self._events.append(last)
        assert last.extra_keys is not None
        last.block_hashes.append(key)
        last.token_ids += token_ids[start:end].tolist()
        last.extra_keys.append(extra or None)

    def on_removed(self, key: bytes) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(key)
        else:
            self._events.append(BlockRemoved([key], GPU))

    def on_cleared(self) -> None:
        self._events.append(AllBlocksCleared())
