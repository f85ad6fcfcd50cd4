"""Loads adapters from disk into host memory and from there into their pages.

Reader threads (engine/adapters/reader.py) read, check and pack. A read that fails for a passing
reason is repeated (engine/adapters/read_queue.py). One loader thread copies into pages
and reports the end of each copy. On a GPU no step waits for a read or a copy; the streams are
explained in memory/device/page_copier.py.
"""

import logging
import queue
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from loraplex.engine.adapters.adapter_folders import AdapterFolders
from loraplex.engine.adapters.loads.load import Load
from loraplex.engine.adapters.loads.page_finisher import NoFinisher, PageFinisher
from loraplex.engine.adapters.loads.turns import Turns
from loraplex.engine.adapters.open_file import root_of
from loraplex.engine.adapters.peft_config import read_peft_config
from loraplex.engine.adapters.read_queue import ReadQueue
from loraplex.engine.adapters.reader import NUM_READERS, AdapterReader
from loraplex.engine.adapters.reader_error import ReaderError
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.errors import AdapterError
from loraplex.memory.device.page_copier import Event, PageCopier
from loraplex.memory.host.slab import plain_slab, shared_slab
from loraplex.memory.host.store import Allocate, HostStore, PackedAdapter
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
)

logger = logging.getLogger("loraplex")

VOCABULARY = ("embed_tokens", "lm_head")

MAX_COPIES = 2
"""Loads whose copies are enqueued at one time: enough to keep the copy stream busy."""


class AdapterLoader:
    """Executes the adapter commands of one worker beside its steps.

    The thread that launches steps calls `inspect`, `load`, `unload`, `drop` and `finish`; none of
    them waits. Other threads pass the results of `inspect` and `load` to `report`.

    Args:
        reader: reads adapters for the table's target; closed with the loader.
        host_bytes: capacity of the host store.
        report: takes an AdapterInspected, a Load that `finish` must take, an AdapterEvicted in the
            order in which the store changed, or an error that no adapter caused. The thread that
            launches steps must raise such an error.
        enter_thread: called first in each thread.
        find_warnings: names the parts of an adapter's folder that are not used. Its second argument
            is that of open_regular_file.
        finisher: computes what is left in the pages of an adapter.

    Attributes:
        store: the host store. Callers only read it.
        folders: finds the files of an adapter by its path. Replace it before the first command.
    """

    def __init__(
        self,
        *,
        reader: AdapterReader,
        table: AdapterTable,
        copier: PageCopier,
        host_bytes: int,
        report: Callable[[AdapterInspected | AdapterEvicted | Load | BaseException], None],
        enter_thread: Callable[[], None] = lambda: None,
        find_warnings: Callable[[Path, str], list[str]] = lambda folder, root: [],
        finisher: PageFinisher | None = None,
    ) -> None:
        target = table.target
        self._module_names = [module.spec.name for module in target.modules]
        self._table = table
        self._copier = copier
        self._report = report
        self._enter_thread = enter_thread
        self._reader = reader
        self._find_warnings = find_warnings
        self.folders = AdapterFolders()
        self._finisher = finisher or NoFinisher()
        self._shared: set[str] = set()  # content hashes of adapters that all ranks finish together
        self._num_turns = 0
        self._adapter_roots = target.adapter_roots
        make_slab: Allocate = plain_slab
        if target.pin_memory or reader.needs_shared_memory:
            make_slab = partial(shared_slab, page_locked=target.pin_memory)
        self.store = HostStore(host_bytes, make_slab=make_slab)
        self._report_order = threading.Lock()
        self._reads = ReadQueue(NUM_READERS, enter_thread)
        self._queue: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()
        self._preparer = ThreadPoolExecutor(1, "slab-preparer", initializer=enter_thread)
        self._inspectors = ThreadPoolExecutor(NUM_READERS, "adapter-inspector")
        self._prepare()

    def inspect(self, command: InspectAdapter) -> None:
        """Answered by an AdapterInspected."""

        def fail(error: Exception, is_transient: bool) -> None:
            text = _explain(command.name, error)
            self._report_in_order(
                AdapterInspected(
                    name=command.name, path=command.path, error=text, is_transient=is_transient
                )
            )
            self._prepare()

        self._reads.submit(lambda: self._inspect(command), fail)

    def load(self, command: LoadAdapter, wait_for: Event) -> None:
        """Begin a load, which is answered by a Load.

        The load owns the pages and the slot until then. It writes them once `wait_for` is reached,
        when the last step that used them before has ended.
        """
        load = Load(command, wait_for)
        if command.content_hash in self._shared:  # all ranks are given loads in the same order
            load.turn = self._num_turns
            self._num_turns += 1
        load.adapter = self.store.acquire(command.content_hash)
        if load.adapter is not None:
            load.from_host = True
            self._queue.put(load)
        else:
            self._submit_read(load)

    def unload(self, adapter_slot: int) -> None:
        """Empty the row of a loaded adapter. Its pages may be reused from now on."""
        self._table.clear(adapter_slot)

    def drop(self, content_hash: str) -> None:
        """Free its host memory, once the loads under way are done with it."""
        self.store.drop(content_hash)
        self._report_in_order()

    def finish(self, load: Load) -> AdapterLoaded:
        """Fill the table's row of a load that was reported; steps may use its slot from now on."""
        command = load.command
        if not load.error:
            assert load.adapter is not None
            page_ids = torch.tensor(command.page_ids, dtype=torch.int32)
            self._table.write_host(command.adapter_slot, load.adapter, page_ids)
        return AdapterLoaded(
            adapter_slot=command.adapter_slot,
            content_hash=command.content_hash,
            error=load.error,
            load_us=int((time.perf_counter() - load.started_at) * 1e6),
            from_host=load.from_host,
            is_transient=load.is_transient,
        )

    def close(self) -> None:
        """Stop the threads; reads that have not begun are dropped."""
        self._reads.close()
        self._preparer.shutdown(wait=True, cancel_futures=True)
        self._inspectors.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        self._queue.put(None)
        self._thread.join()

    def _inspect(self, command: InspectAdapter) -> None:
        with self.folders.open(command.path) as folder:
            answer = self._inspect_folder(command, folder)
        self._report_in_order(answer, release=answer.content_hash)
        self._prepare()

    def _inspect_folder(self, command: InspectAdapter, folder: Path) -> AdapterInspected:
        """Adds an adapter to the host store, where it stays until it is released."""
        root = root_of(folder, self._adapter_roots)

        def look() -> tuple[list[str], Sequence[int]]:
            config = read_peft_config(folder, root)
            return self._find_warnings(folder, root), config.invocation_tokens

        looking = self._inspectors.submit(look)  # while the weights are read
        adapter = self.store.add(
            lambda allocate: self._reader.read(command.name, folder, allocate), acquire=True
        )
        if self._finisher.is_shared(adapter):
            self._shared.add(adapter.content_hash)
        try:
            warnings, invocation_tokens = looking.result()
        except BaseException:
            self.store.release(adapter.content_hash)
            raise
        return _describe(command, adapter, self._module_names, warnings, invocation_tokens)

    def _submit_read(self, load: Load) -> None:
        def fail(error: Exception, is_transient: bool) -> None:
            load.error = _explain(Path(load.command.path).name, error)
            load.is_transient = is_transient
            self._queue.put(load)
            self._prepare()

        self._reads.submit(lambda: self._read_again(load), fail)

    def _read_again(self, load: Load) -> None:
        """Read an adapter that the host store has evicted; its content must be unchanged."""
        path = load.command.path
        name = Path(path).name

        def read(allocate: Allocate) -> PackedAdapter:
            with self.folders.open(path) as folder:
                adapter = self._reader.read(name, folder, allocate)
            if adapter.content_hash != load.command.content_hash:
                raise AdapterError(
                    f"adapter {name!r}: the files in {path} have changed since it was "
                    "registered; unload it and register it again"
                )
            return adapter

        load.adapter = self.store.add(read, acquire=True)
        self._queue.put(load)
        self._prepare()

    def _prepare(self) -> None:
        """Reserve room for the next adapters, in a thread of its own."""
        self._preparer.submit(self.store.prepare)

    def _run(self) -> None:
        """Run the loader thread: enqueue copies and report loads in the order they came in."""
        self._enter_thread()
        copying: deque[Load] = deque()
        turns = Turns()
        try:
            while True:
                if copying and (len(copying) == MAX_COPIES or self._queue.empty()):
                    self._end(copying.popleft())
                    continue
                load = self._queue.get()
                if load is None:
                    break
                for ready in turns.add(load):
                    if self._begin(ready):
                        copying.append(ready)
                    else:
                        self._end(ready)
            for load in copying:
                self._end(load)
        except BaseException as error:  # a GPU fault: pages may hold anything
            self._report(error)

    def _begin(self, load: Load) -> bool:
        """Enqueue the copy; false if the load has failed, or the adapter does not fit the pages."""
        command, adapter = load.command, load.adapter
        if adapter is not None and adapter.num_pages != len(command.page_ids):
            load.error = f"it needs {adapter.num_pages} pages, not {len(command.page_ids)}"
        if load.turn >= 0 and not self._finisher.agree(not load.error):
            load.is_transient = load.is_transient or not load.error
            load.error = load.error or "another worker rank could not read it"
        if load.error:
            return False
        assert adapter is not None

        def then(ids: torch.Tensor) -> None:
            self._finisher.finish(adapter, ids)
            self._table.write_device(command.adapter_slot, adapter, ids)

        load.copied = self._copier.copy(
            adapter.data, command.page_ids, wait_for=load.wait_for, then=then
        )
        return True

    def _end(self, load: Load) -> None:
        if load.copied is not None:
            load.copied.synchronize()
        self._report_in_order(
            load, release=load.command.content_hash if load.adapter is not None else ""
        )

    def _report_in_order(
        self, item: AdapterInspected | Load | None = None, release: str = ""
    ) -> None:
        """Report an item after all evictions so far, and before an eviction of its own content."""
        with self._report_order:
            self._report_evicted()
            if release:
                self.store.release(release)
            if item is not None:
                self._report(item)
            self._report_evicted()

    def _report_evicted(self) -> None:
        for content_hash in self.store.take_evicted():
            self._report(AdapterEvicted(content_hash))


def _describe(
    command: InspectAdapter,
    adapter: PackedAdapter,
    names: list[str],
    warnings: list[str],
    invocation_tokens: Sequence[int],
) -> AdapterInspected:
    used = adapter.rank.amax(dim=0).tolist()
    parts = (adapter.vocabulary.embedding, adapter.vocabulary.head)
    used += [part.rank if part is not None else 0 for part in parts]
    changed = [part is not None for part in parts]
    return AdapterInspected(
        name=command.name,
        path=command.path,
        content_hash=adapter.content_hash,
        num_pages=adapter.num_pages,
        num_bytes=adapter.num_bytes,
        kind=adapter.kind,
        max_rank=max(used),
        modules=[name for name, rank in zip(names, used, strict=False) if rank]
        + [name for name, is_changed in zip(VOCABULARY, changed, strict=True) if is_changed],
        warnings=warnings,
        invocation_tokens=array("i", invocation_tokens),
        num_tokens=adapter.vocabulary.num_tokens,
    )


def _explain(name: str, error: Exception) -> str:
    if isinstance(error, AdapterError):
        return str(error)
    if isinstance(error, ReaderError | MemoryError):
        logger.warning("adapter %s cannot be read: %s", name, error)
    else:
        logger.exception("reading adapter %s failed", name, exc_info=error)
    return f"adapter {name!r}: reading it failed for now: {error or type(error).__name__}"
