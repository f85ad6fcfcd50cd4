"""Loads beside the steps: the order of copies, steps and pages that change hands."""

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraplex.engine.adapters import reader
from loraplex.engine.adapters.loader import AdapterLoader, Load
from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.reader import (
    AdapterReader,
    ProcessReader,
    ThreadReader,
    make_reader,
)
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.device.page_copier import HostPageCopier
from loraplex.memory.device.pool import PagePool
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    InspectAdapter,
    LoadAdapter,
    int_array,
)

from helpers.fakes.fake_cudart import FakeCudart
from helpers.models.dummy_models import write_adapter
from helpers.running.adapter_loads import PAGE_SHAPE, SHAPES, TINY, LoadWorld
from helpers.running.processes import GUARD_S, wait_until

CPU = torch.device("cpu")


RUNS = [
    pytest.param(seed, make_reader, num_acts, marks=[pytest.mark.long] if num_acts > 800 else [])
    for num_acts in (750, 2500)
    for seed, make_reader in ((0, ThreadReader), (1, ThreadReader), (2, ProcessReader))
]


@pytest.mark.parametrize(("seed", "make_reader", "num_acts"), RUNS)
def test_random_loads_in_every_order(
    tmp_path: Path,
    seed: int,
    make_reader: Callable[[AdapterTarget], AdapterReader],
    num_acts: int,
) -> None:
    world = LoadWorld(tmp_path, CPU, seed, make_reader=make_reader)
    try:
        for act in range(num_acts):
            world.act()
            if act % 50 == 49:  # however slow the reader is, loads end
                world.settle()
    finally:
        world.close()
    assert world.num_loaded > num_acts / 50
    assert world.num_unloaded > num_acts / 50


class Recorder:
    """A loader over a pool of 20 pages whose reports arrive in a list."""

    def __init__(self, root: Path, **options: object) -> None:
        self.target = AdapterTarget(
            3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8
        )
        self.pool = PagePool(PAGE_SHAPE, 20, CPU)
        self.table = AdapterTable(self.target, 4, CPU)
        self.items: list[object] = []
        self.arrived = threading.Semaphore(0)
        self.path = write_adapter(root / "one", TINY, rank=4, seed=1)
        settings = {"copier": HostPageCopier(self.pool), "host_bytes": 1 << 20, **options}
        self.loader = AdapterLoader(
            reader=ThreadReader(self.target),
            table=self.table,
            report=self._report,
            **settings,
        )

    def load(self, command: LoadAdapter) -> None:
        self.loader.load(command, HostPageCopier(self.pool).record_event())

    def _report(self, item: object) -> None:
        self.items.append(item)
        self.arrived.release()

    def next(self) -> object:
        assert self.arrived.acquire(timeout=GUARD_S)
        return self.items.pop(0)

    def content_hash(self) -> str:
        self.loader.inspect(InspectAdapter("one", str(self.path)))
        return self.next().content_hash

    def command(self, content_hash: str, num_pages: int = 8) -> LoadAdapter:
        pages = int_array(range(3, 3 + num_pages))
        return LoadAdapter(2, content_hash, str(self.path), pages)


def test_nothing_on_the_host_before_finish(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    self_hash = recorder.content_hash()
    pages = recorder.loader.store.acquire(self_hash).num_pages
    recorder.load(recorder.command(self_hash, pages))
    load = recorder.next()
    assert isinstance(load, Load)
    assert recorder.table.table.rank[..., 2].any()  # the device's row comes with the pages
    assert not recorder.table.table.host_rank.any()
    assert recorder.loader.finish(load).error == ""
    assert (recorder.table.table.host_rank[..., 2] == 4).all()
    recorder.loader.close()


def test_a_fault_of_the_device_is_reported_as_it_is(tmp_path: Path) -> None:
    class Broken(HostPageCopier):
        def copy(self, *args: object, **options: object) -> object:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pool = PagePool(PAGE_SHAPE, 4, CPU)
    recorder = Recorder(tmp_path, copier=Broken(pool))
    content_hash = recorder.content_hash()
    pages = recorder.loader.store.acquire(content_hash).num_pages
    recorder.load(recorder.command(content_hash, pages))
    assert isinstance(recorder.next(), RuntimeError)
    recorder.loader.close()


class SlowMemory:
    """An `allocate` step that goes on once the folder was inspected."""

    def __init__(self) -> None:
        self.found = threading.Event()
        self.was_found_first = False

    def find_warnings(self, folder: Path, root: str) -> list[str]:
        self.found.set()
        return ["its chat template is not used"]

    def make_slab(self, num_bytes: int) -> torch.Tensor:
        self.was_found_first = self.found.wait(GUARD_S)
        return torch.empty(num_bytes, dtype=torch.uint8)


def test_a_folder_is_inspected_while_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SlowMemory()
    monkeypatch.setattr("loraplex.engine.adapters.loader.plain_slab", memory.make_slab)
    recorder = Recorder(tmp_path, find_warnings=memory.find_warnings)
    recorder.loader.inspect(InspectAdapter("one", str(recorder.path)))
    assert recorder.next().warnings == ["its chat template is not used"]
    assert memory.was_found_first
    recorder.loader.close()


def test_from_host_drops_and_evictions_are_told(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, host_bytes=60_000)  # for either of two adapters
    content_hash = recorder.content_hash()
    store = recorder.loader.store
    adapter = store.acquire(content_hash)
    assert adapter is not None
    store.release(content_hash)
    command = recorder.command(content_hash, adapter.num_pages)
    recorder.load(command)
    assert recorder.loader.finish(recorder.next()).from_host
    recorder.loader.drop(content_hash)
    assert recorder.next() == AdapterEvicted(content_hash)
    recorder.loader.drop(content_hash)
    assert len(store) == 0 and store.num_bytes == 0
    recorder.loader.unload(2)
    recorder.load(command)
    loaded = recorder.loader.finish(recorder.next())
    assert not loaded.error and not loaded.from_host
    other = write_adapter(tmp_path / "two", TINY, rank=8, seed=2)
    recorder.loader.inspect(InspectAdapter("two", str(other)))
    assert recorder.next() == AdapterEvicted(content_hash)
    assert recorder.next().content_hash != content_hash
    recorder.loader.close()
    store.check_integrity()


def test_dropped_while_it_is_read_for_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load asked for it before: it is done, and a later drop frees the memory."""
    reading, go_on = threading.Event(), threading.Event()
    original = reader.read_adapter

    def slow(*args: object, **options: object) -> object:
        reading.set()
        assert go_on.wait(GUARD_S)
        return original(*args, **options)

    recorder = Recorder(tmp_path)
    packed = original("one", recorder.path, recorder.target)
    monkeypatch.setattr(reader, "read_adapter", slow)
    recorder.load(recorder.command(packed.content_hash, packed.num_pages))
    assert reading.wait(GUARD_S)
    recorder.loader.drop(packed.content_hash)
    go_on.set()
    assert recorder.loader.finish(recorder.next()).error == ""
    recorder.loader.drop(packed.content_hash)
    assert len(recorder.loader.store) == 0
    assert recorder.table.table.rank[..., 2].any(), "what is in pages stays"
    recorder.loader.close()


def test_for_a_gpu_another_process_reads_into_slabs_that_are_taken_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = FakeCudart()
    cudart.install(monkeypatch)
    target = AdapterTarget(
        3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8, pin_memory=True
    )
    paths = [write_adapter(tmp_path / f"a{n}", TINY, rank=8, seed=n) for n in range(9)]
    expected = [read_adapter(path.name, path, target) for path in paths]
    unit = expected[0].num_bytes + 512
    reader = make_reader(target)
    assert isinstance(reader, ProcessReader)
    reports: queue.SimpleQueue[object] = queue.SimpleQueue()
    table = AdapterTable(target, 4, CPU)
    loader = AdapterLoader(
        reader=reader,
        table=table,
        copier=HostPageCopier(PagePool(PAGE_SHAPE, 20, CPU)),
        host_bytes=9 * unit,
        report=reports.put,
    )
    pid, store = reader.pid, loader.store
    wait_until(lambda: store.num_slab_bytes)  # before the first read
    for path, adapter in zip(paths, expected, strict=True):
        loader.inspect(InspectAdapter(path.name, str(path)))
        assert reports.get(timeout=GUARD_S).content_hash == adapter.content_hash
        kept = store.acquire(adapter.content_hash)
        assert kept is not None and torch.equal(kept.data, adapter.data)
        assert any(a <= kept.data.data_ptr() < a + n for a, n in cudart.locked.items())
        store.release(adapter.content_hash)
        store.check_integrity()
    loader.close()
    assert len(store) == 9
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
