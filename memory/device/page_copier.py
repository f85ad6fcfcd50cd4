"""Copies packed adapters into their pages while steps run.

On a GPU there are three streams. Steps are launched on the *compute* stream, the current stream of
the thread that launches them. Each load uses two others: the *copy* stream moves packed layers by
DMA from page-locked memory to a ring of staging buffers, and the *scatter* stream moves them from
there to their pages. DMA occupies no SM; a kernel that reads host memory would. An adapter's layers
are contiguous on the host, so a staging buffer takes a whole adapter, or several layers of a very
large one. Transfers have a few megabytes: smaller ones waste time between them, and larger ones
delay the small arrays that steps upload through the same copy engine.

Ordering, where a load is one call of `copy`:

- A step that was launched earlier may still use the pages. The caller gives an event after that
  step, and the scatter stream waits for it. Transfers to the ring need no such wait.
- Loads scatter in the order of `copy`, on one stream. If pages pass from one load to another, the
  later load writes last.
- Steps may use the pages once the event that `copy` returned is reached. The worker reports the
  load only then, so no step waits on the device. There is no event per layer: a captured graph
  cannot wait for some of its adapters, and all layers take two milliseconds.
- The pages of a load belong to it until it is reported, so no step writes to them meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from loraplex.memory.device.pool import PagePool

STAGING_BYTES = 96 << 20
"""Size of one staging buffer. An adapter of rank 16 on all projections of an 8B model fits."""

NUM_STAGING_BUFFERS = 2

TRANSFER_BYTES = 4 << 20
"""Size of one transfer: 75 us over PCIe, long beside the gap between two transfers. It divides
PIECE_BYTES, as no transfer may cross from one page-locked piece to the next."""

AfterPages = Callable[[torch.Tensor], None]
"""Called once the copy of the pages is enqueued, with the page ids: int64 [n], on the device."""


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""
        ...


class PageCopier(Protocol):
    """Copies adapters into pages.

    The thread that launches steps calls `record_event`; one other thread calls `copy`.
    """

    def record_event(self) -> Event:
        """Return an event that is reached after all work given to the compute stream so far."""
        ...

    def copy(
        self, packed: torch.Tensor, page_ids: Sequence[int], *, wait_for: Event, then: AfterPages
    ) -> Event:
        """Enqueue one load.

        Args:
            packed: [num_layers, n * page_elems] of the pool's dtype, on the CPU, page-locked for a
                GPU. It must stay unchanged until the returned event is reached.
            page_ids: n page ids.
            wait_for: the first write to the pages waits for it.
            then: enqueues more work that belongs to the load.

        Returns:
            An event that is reached when the load is done.
        """
        ...


def make_page_copier(pool: PagePool) -> PageCopier:
    """Make the copier for the pool's device."""
    return StreamPageCopier(pool) if pool.pages.is_cuda else HostPageCopier(pool)


class _Reached:
    """An event that is always reached."""

    def synchronize(self) -> None:
        """Return at once."""


class HostPageCopier:
    """Copies on a CPU, where a step is done when its launch returns."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    def record_event(self) -> Event:
        return _Reached()

    def copy(
        self, packed: torch.Tensor, page_ids: Sequence[int], *, wait_for: Event, then: AfterPages
    ) -> Event:
        wait_for.synchronize()
        ids = torch.tensor(page_ids, dtype=torch.int64)
        self._pool.write_pages(ids, packed)
        then(ids)
        return _Reached()


class StreamPageCopier:
    """Copies to a GPU."""

    def __init__(
        self,
        pool: PagePool,
        *,
        staging_bytes: int = STAGING_BYTES,
        num_buffers: int = NUM_STAGING_BUFFERS,
    ) -> None:
        self._device = device = pool.pages.device
        self._pages = as_words(pool.pages)
        self._pages_per_chunk = max(1, staging_bytes // pool.shape.page_bytes)
        page_words = self._pages.shape[-1]
        shape = (num_buffers, self._pages_per_chunk * page_words)
        self._staging = torch.empty(shape, dtype=torch.int64, device=device)
        self._copy = torch.cuda.Stream(device)
        # A scatter has few blocks. The priority lets them go before the many blocks of a step.
        self._scatter = torch.cuda.Stream(device, priority=-1)
        self._filled = [torch.cuda.Event() for _ in range(num_buffers)]
        self._emptied = [torch.cuda.Event() for _ in range(num_buffers)]
        self._next = 0
        # The compute stream may still read the memory that the allocator gave to the ring.
        current = torch.cuda.current_stream(device)
        self._copy.wait_stream(current)
        self._scatter.wait_stream(current)

    def record_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(
        self, packed: torch.Tensor, page_ids: Sequence[int], *, wait_for: Event, then: AfterPages
    ) -> torch.cuda.Event:
        """Enqueue one load; raises ValueError if `packed` is not page-locked."""
        assert isinstance(wait_for, torch.cuda.Event)
        if not packed.is_pinned():
            raise ValueError("an adapter to be copied to a GPU must lie in page-locked memory")
        num_layers, _, page_words = self._pages.shape
        source = as_words(packed).view(num_layers, len(page_ids), page_words)
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._scatter):
            self._scatter.wait_event(wait_for)
            ids = torch.tensor(page_ids, dtype=torch.int64).pin_memory()
            ids = ids.to(self._device, non_blocking=True)
            for layers, pages in chunks(num_layers, len(page_ids), self._pages_per_chunk):
                self._move(source[layers, pages], self._pages[layers], ids[pages])
            then(ids)
            done.record(self._scatter)
        return done

    def _move(self, source: torch.Tensor, target: torch.Tensor, ids: torch.Tensor) -> None:
        """Move one chunk, [layers, pages, page_words], contiguous on the host."""
        index = self._next
        self._next = (index + 1) % len(self._staging)
        staged = self._staging[index, : source.numel()].view(source.shape)
        with torch.cuda.stream(self._copy):
            self._copy.wait_event(self._emptied[index])  # an event never recorded is reached
            flat = source.reshape(-1)
            sizes = transfers(flat.data_ptr(), flat.nbytes)
            words = [size // flat.element_size() for size in sizes]
            for there, here in zip(staged.view(-1).split(words), flat.split(words), strict=True):
                there.copy_(here, non_blocking=True)
            self._filled[index].record(self._copy)
        self._scatter.wait_event(self._filled[index])
        target.index_copy_(1, ids, staged)
        self._emptied[index].record(self._scatter)


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """View the bytes as int64: copies change no bit, and a GPU's threads move eight bytes each."""
    return tensor.view(torch.int64)


def transfers(address: int, num_bytes: int) -> list[int]:
    """Return the bytes of each transfer, cut at addresses that are multiples of TRANSFER_BYTES."""
    first = min(num_bytes, -address % TRANSFER_BYTES or TRANSFER_BYTES)
    count, rest = divmod(num_bytes - first, TRANSFER_BYTES)
    return [first] + [TRANSFER_BYTES] * count + [rest] * bool(rest)


def chunks(num_layers: int, num_pages: int, max_pages: int) -> Iterator[tuple[slice, slice]]:
    """Yield (layers, pages) of each fill of a staging buffer of `max_pages`.

    A fill has whole layers, or part of one layer that is larger than the buffer. It is contiguous
    in [num_layers, num_pages].
    """
    if num_pages <= max_pages:
        step = max_pages // num_pages
        for layer in range(0, num_layers, step):
            yield slice(layer, min(layer + step, num_layers)), slice(0, num_pages)
        return
    for layer in range(num_layers):
        for page in range(0, num_pages, max_pages):
            yield slice(layer, layer + 1), slice(page, min(page + max_pages, num_pages))
