"""Adapter loads on real streams, beside steps in flight."""

import queue
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from loraplex.engine.adapters.loader import AdapterLoader, Load
from loraplex.engine.adapters.reader import make_reader
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.device.page_copier import StreamPageCopier, chunks
from loraplex.memory.device.pool import PagePool, PageShape
from loraplex.memory.host.slab import PIECE_BYTES, live_slabs, shared_slab
from loraplex.memory.host.store import Allocate, HostStore, PackedAdapter
from loraplex.scheduler.worker_protocol import InspectAdapter, LoadAdapter, int_array

from helpers.models.dummy_models import write_adapter
from helpers.running.adapter_loads import PAGE_SHAPE, SHAPES, TINY, LoadWorld

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
LLAMA_3_8B = PageShape(32, block_tokens=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
LONG = 200_000_000
"""Cycles for torch.cuda._sleep: about a tenth of a second."""


@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_loads(tmp_path: Path, seed: int) -> None:
    """With checks on the compute stream of every resident adapter and every KV page."""
    world = LoadWorld(tmp_path, CUDA, seed, num_adapters=40, num_slots=12, num_pages=100)
    try:
        for step in range(8000):
            world.act()
            if step % 500 == 499:
                world.settle()
    finally:
        world.close()
    assert world.num_loaded > 200 and world.num_unloaded > 100


def random_words(num_bytes: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 62), 1 << 62, (num_bytes // 8,), generator=generator)


def make_packed(shape: PageShape, num_pages: int, seed: int) -> torch.Tensor:
    """Random bits, pinned: [num_layers, num_pages * page_elems]."""
    words = random_words(shape.bytes_over_layers * num_pages, seed=seed).pin_memory()
    return words.view(shape.dtype).view(shape.num_layers, -1)


def nothing(ids: torch.Tensor) -> None:
    """No more belongs to this load."""


@pytest.mark.parametrize("staging_bytes", [1 << 16, 3 << 20, 8 << 20, 1 << 30])
def test_pages_bit_for_bit_beside_steps_that_write_others(staging_bytes: int) -> None:
    """Rank 16 on all seven projections of Llama-3-8B, thrice, over shuffled pages."""
    pool = PagePool(LLAMA_3_8B, 150, CUDA)
    copier = StreamPageCopier(pool, staging_bytes=staging_bytes)
    order = torch.randperm(149, generator=torch.Generator().manual_seed(1)) + 1
    packed = [make_packed(LLAMA_3_8B, 40, seed) for seed in range(3)]
    own = [order[40 * i : 40 * i + 40].tolist() for i in range(3)]
    others = torch.cat((order[120:], torch.zeros(1, dtype=torch.int64))).to(CUDA)
    copied = []
    for data, page_ids in zip(packed, own, strict=True):
        copied.append(copier.copy(data, page_ids, wait_for=copier.record_event(), then=nothing))
        for value in range(20):
            pool.pages.index_fill_(1, others, float(value))
    for event in copied:
        event.synchronize()
    for data, page_ids in zip(packed, own, strict=True):
        got = pool.pages[:, page_ids].cpu().view(torch.int16)
        assert torch.equal(got, data.view(32, 40, -1).view(torch.int16))
    assert (pool.pages[:, others] == 19.0).all()


def test_offsets_beyond_32_bits() -> None:
    """Layers of more than 2^31 elements, several of them and the last page in one chunk."""
    shape = PageShape(3, 128, 8, 128, torch.bfloat16)
    pool = PagePool(shape, (1 << 31) // shape.page_elems + 3, CUDA)
    page_ids = [pool.num_pages - 1, 1, pool.num_pages - 2]
    packed = make_packed(shape, 3, 5)
    copier = StreamPageCopier(pool, staging_bytes=64 << 20)
    assert len(list(chunks(3, 3, (64 << 20) // shape.page_bytes))) == 1
    copier.copy(packed, page_ids, wait_for=copier.record_event(), then=nothing).synchronize()
    got = pool.pages[:, page_ids].cpu().view(torch.int16)
    assert torch.equal(got, packed.view(3, 3, -1).view(torch.int16))
    assert not pool.pages[:, 0].any() and not pool.pages[:, 2].any()


def test_a_load_waits_for_steps_and_loads_before_it() -> None:
    pool = PagePool(PAGE_SHAPE, 8, CUDA)
    copier = StreamPageCopier(pool)
    packed = make_packed(PAGE_SHAPE, 2, 7)
    want = packed.view(3, 2, -1).view(torch.int16)
    ids = torch.tensor([5, 2], device=CUDA)
    # Once before, so that nothing below allocates: that may wait for the device.
    copier.copy(packed, [5, 2], wait_for=copier.record_event(), then=nothing).synchronize()
    pool.pages.index_select(1, ids)
    pool.pages.zero_()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)  # a step that still reads the pages
    before = pool.pages.index_select(1, ids)
    event = copier.copy(packed, [5, 2], wait_for=copier.record_event(), then=nothing)
    assert not event.query()
    torch.cuda.synchronize()
    assert not before.any()
    assert torch.equal(pool.pages[:, ids].cpu().view(torch.int16), want)
    following = make_packed(PAGE_SHAPE, 2, 8)  # a load into the same pages
    torch.cuda._sleep(LONG)
    copier.copy(packed, [5, 2], wait_for=copier.record_event(), then=nothing)
    copier.copy(following, [2, 5], wait_for=copier.record_event(), then=nothing).synchronize()
    got = pool.pages[:, [2, 5]].cpu().view(torch.int16)
    assert torch.equal(got, following.view(3, 2, -1).view(torch.int16))


class Bench:
    """A loader over a small pool on the GPU, and one adapter that it knows."""

    def __init__(self, root: Path) -> None:
        self.target = AdapterTarget(
            3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8, pin_memory=True
        )
        self.pool = PagePool(PAGE_SHAPE, 40, CUDA)
        self.table = AdapterTable(self.target, 4, CUDA)
        self.reports: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.copier = StreamPageCopier(self.pool)
        self.loader = AdapterLoader(
            reader=make_reader(self.target), table=self.table,
            copier=self.copier, host_bytes=1 << 20, report=self.reports.put,
        )  # fmt: skip
        self.path = write_adapter(root / "one", TINY, rank=4, seed=1)
        self.loader.inspect(InspectAdapter("one", str(self.path)))
        self.inspected = self.reports.get(timeout=120)
        assert not self.inspected.error
        pages = int_array(range(9, 9 + self.inspected.num_pages))
        self.command = LoadAdapter(1, self.inspected.content_hash, str(self.path), pages)
        # Once before, so that no test finds the loader allocating: that may wait for the device.
        self.loader.load(self.command, self.copier.record_event())
        assert self.loader.finish(self.reports.get(timeout=120)).error == ""
        self.loader.unload(1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.loader.close()


def test_reported_when_the_copy_has_ended(bench: Bench) -> None:
    """The caller waits for nothing, and the report for the step before the load."""
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    step = torch.cuda.Event()
    step.record()
    bench.loader.load(bench.command, bench.copier.record_event())
    assert bench.reports.empty() and not step.query()  # so load() waited for no step
    load = bench.reports.get(timeout=120)
    assert isinstance(load, Load) and step.query()
    assert bench.loader.finish(load).error == ""
    packed = bench.loader.store.acquire(bench.command.content_hash)
    assert packed is not None and packed.data.is_pinned()
    ids = torch.tensor(bench.command.page_ids)
    got = bench.pool.pages[:, ids.to(CUDA)].cpu()
    assert torch.equal(got, packed.data.view(3, len(ids), -1))
    table = bench.table.table
    for name in ("rank", "a_start", "b_start", "scale"):
        assert torch.equal(getattr(table, name)[..., 1].cpu(), getattr(packed, name))
        assert torch.equal(getattr(table, f"host_{name}")[..., 1], getattr(packed, name))
    assert torch.equal(table.page_table[1, : len(ids)].cpu(), ids.int())
    assert len(bench.target.modules) == table.rank.shape[1]


def test_pages_long_free_do_not_wait_for_the_steps_in_flight(bench: Bench) -> None:
    last_use = bench.copier.record_event()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    step = torch.cuda.Event()
    step.record()
    bench.loader.load(bench.command, last_use)
    load = bench.reports.get(timeout=120)
    assert isinstance(load, Load) and not step.query()
    assert bench.loader.finish(load).error == ""


def test_store_is_pinned_and_copies_demand_it() -> None:
    store = HostStore(1 << 20, make_slab=partial(shared_slab, page_locked=True))
    empty = torch.zeros(3, 7, dtype=torch.int32)

    def read(allocate: Allocate) -> PackedAdapter:
        data = allocate(2 * PAGE_SHAPE.bytes_over_layers).view(torch.bfloat16).view(3, -1)
        return PackedAdapter("hash", 2, data.fill_(2), *[empty] * 5, empty.float())

    packed = store.add(read)
    assert packed.data.is_pinned()
    pool = PagePool(PAGE_SHAPE, 8, CUDA)
    copier = StreamPageCopier(pool)
    copier.copy(packed.data, [3, 6], wait_for=copier.record_event(), then=nothing).synchronize()
    assert (pool.pages[:, [3, 6]] == 2).all()
    with pytest.raises(ValueError, match="page-locked memory"):
        copier.copy(packed.data.clone(), [3, 6], wait_for=copier.record_event(), then=nothing)


def test_adapters_across_page_locked_pieces() -> None:
    """In a slab of five pieces, at every odd place; memory is given back with the slab."""
    pool = PagePool(LLAMA_3_8B, 50, CUDA)
    copier = StreamPageCopier(pool)
    num_bytes = 40 * LLAMA_3_8B.bytes_over_layers
    slab = shared_slab(num_bytes + PIECE_BYTES, page_locked=True)
    assert slab.is_pinned() and slab[-1:].is_pinned()
    before = live_slabs()
    for offset in (0, 512, 3 << 20, PIECE_BYTES - 512):
        data = slab[offset : offset + num_bytes].view(torch.bfloat16).view(32, -1)
        data.view(torch.int64).copy_(random_words(num_bytes, seed=offset).view(32, -1))
        pages = torch.randperm(49, generator=torch.Generator().manual_seed(1))[:40] + 1
        copier.copy(
            data, pages.tolist(), wait_for=copier.record_event(), then=nothing
        ).synchronize()
        got = pool.pages[:, pages].cpu().view(torch.int16)
        assert torch.equal(got, data.view(32, 40, -1).view(torch.int16))
    del slab, data
    assert len(live_slabs()) == len(before) - 1


def test_no_launch_waits_for_page_locking() -> None:
    """If all 512 MiB were locked in one call, about one launch would fit beside it."""
    x = torch.zeros(8, device=CUDA)
    slabs: list[torch.Tensor] = []
    num_pieces, num_launches = 32, 0
    thread = threading.Thread(
        target=lambda: slabs.append(shared_slab(num_pieces * PIECE_BYTES, page_locked=True))
    )
    thread.start()
    while thread.is_alive():
        x.add_(1)
        num_launches += 1
    assert slabs and num_launches > num_pieces
