"""Interface of the computation that follows the copy of an adapter to its pages."""

from typing import Protocol

import torch

from loraplex.memory.host.store import PackedAdapter


class PageFinisher(Protocol):
    """Computes in the pages of an adapter what its files do not hold. Used by the loader thread."""

    def is_shared(self, adapter: PackedAdapter) -> bool:
        """Returns whether all ranks have to finish it together. Any thread may ask."""
        ...

    def agree(self, is_ready: bool) -> bool:
        """Returns whether the adapter is ready on all ranks, which all call this, before `finish`
        of a shared one."""
        ...

    def finish(self, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        """Enqueue the computation, on the current stream.

        Args:
            page_ids: int64 [n] on the device; the copy to these pages is enqueued.
        """
        ...


class NoFinisher:
    """Leaves pages as they are."""

    def is_shared(self, adapter: PackedAdapter) -> bool:
        return False

    def agree(self, is_ready: bool) -> bool:
        return is_ready

    def finish(self, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        """Do nothing."""
