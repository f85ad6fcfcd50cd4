"""Loads that all worker ranks finish together, on two loaders with a barrier between them."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex.engine.adapters.loader import AdapterLoader
from loraplex.engine.adapters.loads.load import Load
from loraplex.engine.adapters.reader import ThreadReader
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.device.page_copier import HostPageCopier
from loraplex.memory.device.pool import PagePool
from loraplex.memory.host.store import Allocate, PackedAdapter
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    int_array,
)

from helpers.models.dummy_models import write_adapter
from helpers.running.adapter_loads import PAGE_SHAPE, SHAPES, TINY
from helpers.running.processes import GUARD_S

TARGET = AdapterTarget(3, whole_modules(SHAPES), PAGE_SHAPE.page_elems, torch.bfloat16, 8)
CPU = torch.device("cpu")


class Meeting:
    """Lets two loader threads agree, as a collective of two ranks does."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=GUARD_S)
        self.votes = [True, True]


class Finisher:
    def __init__(self, meeting: Meeting, rank: int, single: set[str]) -> None:
        self.meeting, self.rank, self.single = meeting, rank, single
        self.finished: list[str] = []

    def is_shared(self, adapter: PackedAdapter) -> bool:
        return adapter.content_hash not in self.single

    def agree(self, is_ready: bool) -> bool:
        self.meeting.votes[self.rank] = is_ready
        self.meeting.barrier.wait()
        result = all(self.meeting.votes)
        self.meeting.barrier.wait()
        return result

    def finish(self, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        self.finished.append(adapter.content_hash)


class GatedReader(ThreadReader):
    """Holds reads while `gate` is clear."""

    def __init__(self) -> None:
        super().__init__(TARGET)
        self.gate = threading.Event()
        self.gate.set()

    def read(self, name: str, folder: Path, allocate: Allocate) -> PackedAdapter:
        assert self.gate.wait(GUARD_S)
        return super().read(name, folder, allocate)


class Rank:
    def __init__(self, meeting: Meeting, rank: int, single: set[str]) -> None:
        self.reports: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.reader = GatedReader()
        self.finisher = Finisher(meeting, rank, single)
        self.copier = HostPageCopier(PagePool(PAGE_SHAPE, 40, CPU))
        self.loader = AdapterLoader(
            reader=self.reader, table=AdapterTable(TARGET, 4, CPU), copier=self.copier,
            host_bytes=4 << 20, report=self.reports.put, finisher=self.finisher,
        )  # fmt: skip

    def inspect(self, path: Path) -> AdapterInspected:
        self.loader.inspect(InspectAdapter(path.name, str(path)))
        return self.next(AdapterInspected)

    def load(self, path: Path, seen: AdapterInspected, slot: int) -> None:
        pages = int_array(range(1 + 12 * slot, 1 + 12 * slot + seen.num_pages))
        command = LoadAdapter(
            adapter_slot=slot, content_hash=seen.content_hash, path=str(path), page_ids=pages,
            after_step=0,
        )  # fmt: skip
        self.loader.load(command, self.copier.record_event())

    def next(self, kind: type) -> object:
        while True:
            item = self.reports.get(timeout=GUARD_S)
            if isinstance(item, kind):
                return item


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Rank]]:
    meeting, single = Meeting(), set[str]()
    made = [Rank(meeting, rank, single) for rank in range(2)]
    yield made
    for rank in made:
        rank.reader.gate.set()
        rank.loader.close()


def test_all_ranks_finish_in_the_order_of_the_commands(ranks: list[Rank], tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"a{n}", TINY, rank=4, seed=n) for n in range(3)]
    seen = [[rank.inspect(path) for path in paths] for rank in ranks][0]
    for rank in ranks:  # the third is no matter of all ranks
        rank.finisher.single.add(seen[2].content_hash)
    first, slow = ranks
    slow.loader.drop(DropAdapter(seen[0].content_hash).content_hash)
    slow.reader.gate.clear()
    for rank in ranks:
        for slot, (path, found) in enumerate(zip(paths[:2], seen, strict=False)):
            rank.load(path, found, slot)
    slow.reader.gate.set()
    for rank in ranks:
        loads = [rank.next(Load) for _ in range(2)]
        assert [load.error for load in loads] == ["", ""]
        assert rank.finisher.finished == [seen[0].content_hash, seen[1].content_hash]


def test_a_load_that_fails_on_one_rank_fails_on_all(ranks: list[Rank], tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"a{n}", TINY, rank=4, seed=n) for n in range(2)]
    seen = [[rank.inspect(path) for path in paths] for rank in ranks][0]
    good, bad = ranks
    bad.loader.drop(seen[0].content_hash)
    write_adapter(paths[0], TINY, rank=4, seed=9)  # other content
    for rank in ranks:
        for slot, (path, found) in enumerate(zip(paths, seen, strict=True)):
            rank.load(path, found, slot)
    errors = {}
    for rank in ranks:
        loads = [rank.next(Load) for _ in range(2)]
        errors[rank] = {load.command.adapter_slot: load.error for load in loads}
        assert errors[rank][1] == "" and rank.finisher.finished == [seen[1].content_hash]
    assert errors[good][0] == "another worker rank could not read it"
    assert "have changed since it was registered" in errors[bad][0]
    for rank in ranks:
        assert not rank.loader.store.num_in_use
