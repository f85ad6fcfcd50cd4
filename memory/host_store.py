"""Packed adapters in host memory, by content: the tier between disk and pages."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in page layout (memory/adapter_layout.py), ready to be copied into pages.

    L layers, M modules; a module that the adapter leaves alone has rank 0.
    """

    content_hash: str
    num_pages: int
    data: torch.Tensor  # [L, num_pages * page_elems] of the model's dtype; pinned for a GPU
    rank: torch.Tensor  # int32 [L, M]
    a_start: torch.Tensor  # int32 [L, M]
    b_start: torch.Tensor  # int32 [L, M]
    scale: torch.Tensor  # float32 [L, M]

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


class HostStore:
    """Least recently used out first; pinned ones stay. Safe to use from several threads.

    One adapter larger than the budget is still kept until the next one comes: what has just been
    read is about to be loaded.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._adapters

    def add(self, adapter: PackedAdapter, *, pin: bool = False) -> PackedAdapter:
        """Keep `adapter` and evict others to make room; returns the one kept.

        If its content is here already, that copy stays and is the one returned.
        """
        with self._lock:
            content_hash = adapter.content_hash
            kept = self._adapters.setdefault(content_hash, adapter)
            self._adapters.move_to_end(content_hash)
            if kept is adapter:
                self._num_bytes += adapter.num_bytes
            if pin:
                self._pins[content_hash] = self._pins.get(content_hash, 0) + 1
            self._evict(keep=content_hash)
            return kept

    def pin(self, content_hash: str) -> PackedAdapter | None:
        """The adapter, which then stays until `unpin`; None when it is not here."""
        with self._lock:
            adapter = self._adapters.get(content_hash)
            if adapter is not None:
                self._adapters.move_to_end(content_hash)
                self._pins[content_hash] = self._pins.get(content_hash, 0) + 1
            return adapter

    def unpin(self, content_hash: str) -> None:
        with self._lock:
            count = self._pins.pop(content_hash) - 1
            if count:
                self._pins[content_hash] = count
            self._evict(keep=content_hash)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance."""
        with self._lock:
            total = sum(adapter.num_bytes for adapter in self._adapters.values())
            assert total == self._num_bytes, (total, self._num_bytes)
            assert set(self._pins) <= set(self._adapters)
            assert all(count > 0 for count in self._pins.values())

    def _evict(self, keep: str) -> None:
        for content_hash in list(self._adapters):
            if self._num_bytes <= self._budget_bytes:
                return
            if content_hash != keep and content_hash not in self._pins:
                self._num_bytes -= self._adapters.pop(content_hash).num_bytes
