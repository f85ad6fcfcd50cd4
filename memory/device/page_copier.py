"""Copies of packed adapters into their pages that no step waits for.

Three streams on a GPU. The *compute* stream is the current one of the thread that launches steps;
loads have a *link* stream, which moves packed layers from pinned memory to a staging ring by DMA,
and a *scatter* stream, which puts them into their pages. DMA takes no part of any SM; a kernel that
read host memory would. An adapter's layers are contiguous on the host, so a staging buffer takes
a whole adapter, or several layers of a very large one, and the link sees transfers of some
megabytes, never one a page. They are no larger because steps upload their own small arrays through
the same engine, and wait for the transfer that is on its way.

Ordering, where "load" is one call of `copy`:

- Its pages may still be in use by a step that was launched before it was asked for. The caller
  names a mark of the compute stream behind that step, and the scatter stream waits for it; for
  pages that are long free it is reached already. Transfers to the ring need no such wait.
- Loads scatter in the order of `copy`, on one stream: pages that pass from one load to the next,
  whether the first still runs or not, end with what the next one put there.
- Steps may use the pages once the mark that `copy` returned is reached. The worker reports the load
  only then, so no step waits on the device. There is no event per layer for steps to start on the
  first layers: a captured graph cannot wait for some of its adapters, and all the layers take two
  milliseconds.
- Pages that are taken from a load while it runs are the compute stream's next: `hold` makes it wait
  for that load's mark.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from loraplex.memory.device.pool import PagePool

STAGING_BYTES = 96 << 20
"""Of one buffer: an adapter of rank 16 on all projections of an 8B model fits."""

NUM_STAGING_BUFFERS = 2

TRANSFER_BYTES = 4 << 20
"""Of one transfer: 75 us of the link, beside which what lies between two transfers is small. Part
of a PIECE_BYTES, as no transfer may cross from one page-locked piece to the next."""

AfterPages = Callable[[torch.Tensor], None]
"""Called where the pages have been enqueued, with the page ids: int64 [n], on the device."""


class Mark(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""
        ...


class PageCopier(Protocol):
    """`mark` and `hold` are for the thread that launches steps, `copy` for one other thread."""

    def mark(self) -> Mark:
        """After all that the compute stream was given so far."""
        ...

    def hold(self, mark: Mark) -> None:
        """Let what is launched from now on wait on the device until `mark` is reached."""
        ...

    def copy(
        self, packed: torch.Tensor, page_ids: Sequence[int], *, after: Mark, then: AfterPages
    ) -> Mark:
        """Enqueue one load; the mark is reached when it is done.

        Args:
            packed: [num_layers, n * page_elems] of the pool's dtype, on the CPU, pinned for a GPU;
                to be kept unchanged until the mark is reached.
            page_ids: n of them.
            after: the first write to the pages waits for it.
            then: enqueues more that belongs to the load.
        """
        ...


def make_page_copier(pool: PagePool) -> PageCopier:
    return StreamPageCopier(pool) if pool.pages.is_cuda else HostPageCopier(pool)


class _Reached:
    def synchronize(self) -> None:
        """It is."""


class HostPageCopier:
    """On a CPU, where a step is done when its launch returns."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    def mark(self) -> Mark:
        return _Reached()

    def hold(self, mark: Mark) -> None:
        mark.synchronize()

    def copy(
        self, packed: torch.Tensor, page_ids: Sequence[int], *, after: Mark, then: AfterPages
    ) -> Mark:
        after.synchronize()
        ids = torch.tensor(page_ids, dtype=torch.int64)
        self._pool.write_pages(ids, packed)
        then(ids)
        return _Reached()


class StreamPageCopier:
    """On a GPU."""

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
        self._link = torch.cuda.Stream(device)
        # Steps fill the device with blocks; the few of a scatter should not queue behind them.
        self._scatter = torch.cuda.Stream(device, priority=-1)
        self._filled = [torch.cuda.Event() for _ in range(num_buffers)]
        self._emptied = [torch.cuda.Event() for _ in range(num_buffers)]
        self._next = 0
        # The ring's memory may have been another tensor's, which the compute stream still reads.
        current = torch.cuda.current_stream(device)
        self._link.wait_stream(current)
        self._scatter.wait_stream(current)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def hold(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)

    def copy(
        self, packed: torch.Tensor, page_ids: Sequence[int], *, after: Mark, then: AfterPages
    ) -> torch.cuda.Event:
        assert isinstance(after, torch.cuda.Event)
        if not packed.is_pinned():
            raise ValueError("an adapter to be copied to a GPU must lie in pinned memory")
        num_layers, _, page_words = self._pages.shape
        source = as_words(packed).view(num_layers, len(page_ids), page_words)
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._scatter):
            self._scatter.wait_event(after)
            ids = torch.tensor(page_ids, dtype=torch.int64).pin_memory()
            ids = ids.to(self._device, non_blocking=True)
            for layers, pages in chunks(num_layers, len(page_ids), self._pages_per_chunk):
                self._move(source[layers, pages], self._pages[layers], ids[pages])
            then(ids)
            done.record(self._scatter)
        return done

    def _move(self, source: torch.Tensor, target: torch.Tensor, ids: torch.Tensor) -> None:
        """One chunk [layers, pages, page_words], contiguous on the host."""
        index = self._next
        self._next = (index + 1) % len(self._staging)
        staged = self._staging[index, : source.numel()].view(source.shape)
        with torch.cuda.stream(self._link):
            self._link.wait_event(self._emptied[index])  # no wait before its first record
            flat = source.reshape(-1)
            sizes = transfers(flat.data_ptr(), flat.nbytes)
            words = [size // flat.element_size() for size in sizes]
            for there, here in zip(staged.view(-1).split(words), flat.split(words), strict=True):
                there.copy_(here, non_blocking=True)
            self._filled[index].record(self._link)
        self._scatter.wait_event(self._filled[index])
        target.index_copy_(1, ids, staged)
        self._emptied[index].record(self._scatter)


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as int64: copies of numbers neither round nor canonicalise them, and a GPU's
    threads move eight bytes each."""
    return tensor.view(torch.int64)


def transfers(address: int, num_bytes: int) -> list[int]:
    """Bytes of each, cut where addresses are multiples of TRANSFER_BYTES."""
    first = min(num_bytes, -address % TRANSFER_BYTES or TRANSFER_BYTES)
    count, rest = divmod(num_bytes - first, TRANSFER_BYTES)
    return [first] + [TRANSFER_BYTES] * count + [rest] * bool(rest)


def chunks(num_layers: int, num_pages: int, max_pages: int) -> Iterator[tuple[slice, slice]]:
    """(layers, pages) of each fill of a staging buffer: whole layers, or a part of one where it is
    larger than `max_pages`. Each is contiguous in [num_layers, num_pages]."""
    if num_pages <= max_pages:
        step = max_pages // num_pages
        for layer in range(0, num_layers, step):
            yield slice(layer, min(layer + step, num_layers)), slice(0, num_pages)
        return
    for layer in range(num_layers):
        for page in range(0, num_pages, max_pages):
            yield slice(layer, layer + 1), slice(page, min(page + max_pages, num_pages))
