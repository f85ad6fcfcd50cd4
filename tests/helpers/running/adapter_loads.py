"""A worker's adapter loads without the worker: random loads and unloads among writes to KV pages.

What is launched on the compute stream checks itself there: every resident adapter must lie in its
pages bit for bit, with its row in the table, an unloaded slot must be empty, and KV pages must keep
what was written to them. On a CPU the streams are simulated: queues of operations that a seeded
random choice interleaves in every way that their waits allow.
"""

import queue
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.engine.adapters.loader import AdapterLoader, Load
from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.reader import AdapterReader, make_reader
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.adapter_layout import ModuleShape
from loraplex.memory.device.page_copier import StreamPageCopier
from loraplex.memory.device.pool import PagePool, PageShape
from loraplex.memory.host.store import PackedAdapter
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    LoadAdapter,
    int_array,
)

from helpers.models.dummy_models import write_adapter
from helpers.running.streams import TIMEOUT_S, RealStreams, SimulatedStreams

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SHAPES = tuple(
    ModuleShape(*pair)
    for pair in ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
)
PAGE_SHAPE = PageShape(3, block_tokens=8, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16)


@dataclass(slots=True, eq=False)
class Placed:
    """An adapter in a slot, or on its way there."""

    index: int
    slot: int
    page_ids: list[int]
    command: LoadAdapter | None = None


@dataclass(slots=True)
class KvPages:
    page_ids: list[int]
    value: float


@dataclass
class LoadWorld:
    """`act` does one thing at random; `settle` waits for all and checks once more."""

    root: Path
    device: torch.device
    seed: int
    num_adapters: int = 12
    num_slots: int = 6
    num_pages: int = 48
    host_bytes: int = 150_000
    staging_bytes: int = 4096
    make_reader: Callable[[AdapterTarget], AdapterReader] = make_reader
    num_loaded: int = 0
    num_unloaded: int = 0
    resident: dict[int, Placed] = field(default_factory=dict)
    loading: list[Placed] = field(default_factory=list)
    kv: list[KvPages] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        is_gpu = self.device.type == "cuda"
        self.target = AdapterTarget(
            3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8, pin_memory=is_gpu
        )
        self.pool = PagePool(PAGE_SHAPE, self.num_pages, self.device)
        self.bad = torch.zeros(3, dtype=torch.int64, device=self.device)  # pages, rows, KV
        copier: Any
        if is_gpu:
            self.streams: Any = RealStreams(self.seed)
            copier = StreamPageCopier(self.pool, staging_bytes=self.staging_bytes, num_buffers=2)
        else:
            copier = self.streams = SimulatedStreams(self.pool, self.seed)
        self.table = AdapterTable(self.target, self.num_slots, self.device)
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.loader = AdapterLoader(
            reader=self.make_reader(self.target), table=self.table,
            copier=copier, host_bytes=self.host_bytes, report=self.reports.put,
        )  # fmt: skip
        self.record_event = copier.record_event
        self.paths, self.adapters, self.oracles = [], [], []
        for index in range(self.num_adapters):
            path = write_adapter(self.root / f"a{index}", TINY, rank=1 + index % 8, seed=index)
            packed = read_adapter(str(index), path, self.target)
            self.paths.append(path)
            self.adapters.append(packed)
            self.oracles.append(self._to_device(packed))
        self.free_pages = list(range(1, self.num_pages))
        self.free_slots = list(range(self.num_slots))
        self.next_value = 1.0
        self.events = [copier.record_event()]
        self.last_launch: dict[tuple[str, int], int] = {}  # of a slot or page: index into events

    def act(self) -> None:
        actions = (self.load, self.load, self.unload, self.write_kv, self.free_kv, self.check)
        self.rng.choice(actions)()
        self.streams.advance(self.rng.randrange(20))
        self.poll()

    def load(self) -> None:
        taken = {placed.index for placed in [*self.resident.values(), *self.loading]}
        index = self.rng.choice([i for i in range(self.num_adapters) if i not in taken])
        adapter = self.adapters[index]
        if not self.free_slots or adapter.num_pages > len(self.free_pages):
            return
        placed = Placed(index, self.free_slots.pop(), self._take(adapter.num_pages))
        placed.command = LoadAdapter(
            placed.slot, adapter.content_hash, str(self.paths[index]), int_array(placed.page_ids)
        )
        self.loading.append(placed)
        self.loader.load(placed.command, self._last_use(placed))

    def _last_use(self, placed: Placed) -> Any:
        """Behind all that was launched on its slot and pages, as a worker knows from the
        scheduler; now and then behind all that was launched."""
        if self.rng.random() < 0.2:
            return self.record_event()
        keys = [("slot", placed.slot), *(("page", page_id) for page_id in placed.page_ids)]
        numbers = [self.last_launch[key] for key in keys if key in self.last_launch]
        return self.events[max(numbers, default=0)]

    def _launch(
        self, function: Callable[[], Any], *, slot: int = -1, page_ids: Sequence[int] = ()
    ) -> None:
        self.streams.launch(function)
        self.events.append(self.record_event())
        used = [("slot", slot), *(("page", page_id) for page_id in page_ids)]
        self.last_launch.update(dict.fromkeys(used, len(self.events) - 1))

    def unload(self) -> None:
        if self.resident:
            placed = self.resident.pop(self.rng.choice(sorted(self.resident)))
            self.num_unloaded += 1
            self.loader.unload(placed.slot)
            with pytest.raises(ValueError, match="not loaded"):
                self.table.check(self.table.table, np.array([placed.slot]))
            self.free_slots.append(placed.slot)
            self.free_pages += placed.page_ids

    def write_kv(self) -> None:
        count = self.rng.randrange(1, 5)
        if count <= len(self.free_pages):
            kv = KvPages(self._take(count), self.next_value)
            self.next_value = self.next_value % 100 + 1
            self.kv.append(kv)
            ids = self._ids(kv.page_ids)
            write = partial(self.pool.pages.index_fill_, 1, ids, kv.value)
            self._launch(write, page_ids=kv.page_ids)

    def free_kv(self) -> None:
        if self.kv:
            kv = self.kv.pop(self.rng.randrange(len(self.kv)))
            self._check_kv(kv)
            self.free_pages += kv.page_ids

    def check(self) -> None:
        for placed in self.resident.values():
            self._check_adapter(placed)
        for kv in self.kv:
            self._check_kv(kv)

    def poll(self) -> None:
        while True:
            try:
                item = self.reports.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, AdapterInspected | AdapterEvicted):
                continue
            self._finish(item)

    def settle(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.loading:
            assert time.monotonic() < deadline, "loads were lost"
            self.streams.advance(50)
            self.poll()
        self.check()
        while not self.streams.is_idle():
            assert time.monotonic() < deadline, "a stream is stuck"
            self.streams.advance(50)
        assert self.bad.tolist() == [0, 0, 0], "wrong pages, rows or KV"
        self.loader.store.check_integrity()
        assert self.loader.store.num_in_use == 0

    def close(self) -> None:
        self.loader.close()

    def _take(self, count: int) -> list[int]:
        """The pages freed last, in any order: they pass at once from one tenant to another."""
        pages = [self.free_pages.pop() for _ in range(count)]
        self.rng.shuffle(pages)
        return pages

    def _finish(self, load: Load) -> None:
        (placed,) = (placed for placed in self.loading if placed.command is load.command)
        self.loading.remove(placed)
        event = self.loader.finish(load)
        assert not event.error
        self.num_loaded += 1
        self.resident[placed.slot] = placed
        host = self.table.table.host_rank[..., placed.slot]
        assert torch.equal(host, self.adapters[placed.index].rank)
        self._check_adapter(placed)

    def _check_adapter(self, placed: Placed) -> None:
        oracle = self.oracles[placed.index]
        ids = self._ids(placed.page_ids)
        slot = placed.slot

        def check() -> None:
            shape = (3, len(ids), PAGE_SHAPE.page_elems)
            got = self.pool.pages.index_select(1, ids).view(torch.int16)
            want = oracle.data.view(shape).view(torch.int16)
            self.bad[0] += (got != want).any()
            self.bad[1] += (self.table.table.page_table[slot, : len(ids)] != ids).any()

        self._launch(check, slot=slot, page_ids=placed.page_ids)
        self._check_row(slot, oracle.rank)

    def _check_row(self, slot: int, rank: torch.Tensor) -> None:
        def check() -> None:
            self.bad[1] += (self.table.table.rank[..., slot] != rank).any()

        self._launch(check, slot=slot)

    def _check_kv(self, kv: KvPages) -> None:
        ids = self._ids(kv.page_ids)

        def check() -> None:
            self.bad[2] += (self.pool.pages.index_select(1, ids) != kv.value).any()

        self._launch(check, page_ids=kv.page_ids)

    def _ids(self, page_ids: list[int]) -> torch.Tensor:
        """On the device, without a wait for it."""
        ids = torch.tensor(page_ids)
        if self.device.type == "cuda":
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        return ids

    def _to_device(self, packed: PackedAdapter) -> PackedAdapter:
        return PackedAdapter(
            packed.content_hash, packed.num_pages,
            *(getattr(packed, name).to(self.device)
              for name in ("data", "rank", "a_start", "b_start", "gain_start", "shift_start",
                           "scale")),
        )  # fmt: skip
