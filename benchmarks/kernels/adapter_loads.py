"""Measures what loading adapters costs, and what it costs the steps beside it.

Rank 16 on all seven projections of Llama-3-8B, 84 MB an adapter, random weights.

copy:   pinned memory to scattered pages, loads enqueued back to back, against one plain copy of as
        many bytes to the device.
load:   from the command to the report, one at a time: from the host store, from disk in the page
        cache when the file is known, and the first inspection of a file that is not.
beside: a stand-in for decode steps (the matmuls of a 7B model at 64 rows, in a CUDA graph, two
        replays in flight) while so many loads a second go on; the time from the end of one replay
        to the end of the next.

    python benchmarks/kernels/adapter_loads.py --out benchmarks/results/adapter_loads.jsonl
"""

import argparse
import itertools
import json
import platform
import queue
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.engine.adapters.content_hash import SETTLE_S
from loraplex.engine.adapters.loader import AdapterLoader, Load
from loraplex.engine.adapters.reader import make_reader
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
from loraplex.entrypoints.bench.dummy import AdapterWriter, model_config
from loraplex.entrypoints.bench.gpu_timing import capture
from loraplex.memory.adapter_layout import ModuleShape
from loraplex.memory.device.page_copier import StreamPageCopier
from loraplex.memory.device.pool import PagePool, PageShape
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    InspectAdapter,
    LoadAdapter,
    int_array,
)

MODEL, RANK, NUM_LAYERS = "llama-3-8b", 16, 32
HIDDEN, KV, INNER = 4096, 1024, 14336
SHAPES = tuple(
    ModuleShape(*pair)
    for pair in ((HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), (HIDDEN, INNER),
                 (HIDDEN, INNER), (INNER, HIDDEN))
)  # fmt: skip
NUM_ADAPTERS = 12
NUM_SLOTS = 8
PAGES_EACH = 40
STORE_ALL = 4 << 30
STORE_FEW = 512 << 20  # six adapters: a tour of twelve finds none of them
DECODE_ROWS = 64


@dataclass(frozen=True)
class Beside:
    """A rate of loads while steps run; from_disk: none of them is in the host store."""

    loads_per_s: float
    from_disk: bool
    seconds: float


BESIDE = (
    Beside(0, False, 6), Beside(50, False, 6), Beside(200, False, 4), Beside(400, False, 4),
    Beside(20, True, 6), Beside(0, False, 6),
)  # fmt: skip


class Setup:
    """A pool, a loader and adapters on disk that it has inspected."""

    def __init__(self, folder: Path, host_bytes: int, pool: PagePool) -> None:
        device = pool.pages.device
        target = AdapterTarget(
            NUM_LAYERS,
            whole_modules(SHAPES),
            pool.shape.page_elems,
            torch.bfloat16,
            64,
            pin_memory=True,
        )
        self.table = AdapterTable(target, NUM_SLOTS, device)
        self.reports: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.copier = StreamPageCopier(pool)
        self.last_uses = [self.copier.record_event()] * NUM_SLOTS
        self.loader = AdapterLoader(
            reader=make_reader(target), table=self.table, copier=self.copier,
            host_bytes=host_bytes, report=self._take,
            enter_thread=lambda: torch.cuda.set_device(device),
        )  # fmt: skip
        order = torch.randperm(pool.num_pages - 1)[: NUM_SLOTS * PAGES_EACH] + 1
        self.pages = order.view(NUM_SLOTS, PAGES_EACH).tolist()
        self.inspect_ms: list[float] = []
        self.hashes = []
        self.paths = sorted(folder.iterdir())
        for path in self.paths:
            start = time.perf_counter()
            self.loader.inspect(InspectAdapter(path.name, str(path)))
            event = self.reports.get()
            self.inspect_ms.append((time.perf_counter() - start) * 1e3)
            assert isinstance(event, AdapterInspected) and not event.error, event
            assert event.num_pages == PAGES_EACH
            self.hashes.append(event.content_hash)
        self.num_bytes = event.num_bytes
        self.turn = itertools.count()
        self.free_slots = deque(range(NUM_SLOTS))

    def _take(self, item: object) -> None:
        if not isinstance(item, AdapterEvicted):
            self.reports.put(item)

    def begin(self) -> None:
        """Load the next adapter into what has been free for longest; `free_slots` must not be
        empty."""
        slot, index = self.free_slots.popleft(), next(self.turn) % len(self.paths)
        command = LoadAdapter(
            slot, self.hashes[index], str(self.paths[index]), int_array(self.pages[slot])
        )
        self.loader.load(command, self.last_uses[slot])

    def finish(self, timeout_s: float | None = None) -> float:
        """Take in one load; returns its milliseconds.

        Raises:
            queue.Empty: none has ended.
        """
        item = self.reports.get_nowait() if timeout_s is None else self.reports.get(True, timeout_s)
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, Load)
        loaded = self.loader.finish(item)
        assert not loaded.error, loaded
        self.loader.unload(loaded.adapter_slot)
        self.last_uses[loaded.adapter_slot] = self.copier.record_event()
        self.free_slots.append(loaded.adapter_slot)
        return loaded.load_us / 1e3


def time_copies(pool: PagePool, num_loads: int) -> dict[str, float]:
    """GB/s of plain copies and of loads, medians of five runs."""
    copier = StreamPageCopier(pool)
    words = pool.shape.bytes_over_layers * PAGES_EACH // 8
    packed = [
        torch.randint(-(1 << 62), 1 << 62, (words,)).pin_memory().view(torch.bfloat16)
        for _ in range(4)
    ]
    on_device = torch.empty_like(packed[0], device=pool.pages.device)
    order = torch.randperm(pool.num_pages - 1)[: NUM_SLOTS * PAGES_EACH] + 1
    pages = order.view(NUM_SLOTS, PAGES_EACH).tolist()

    def plain() -> None:
        for turn in range(num_loads):
            on_device.copy_(packed[turn % len(packed)], non_blocking=True)
        torch.cuda.synchronize()

    def loads() -> None:
        event = copier.record_event()
        for turn in range(num_loads):
            data = packed[turn % len(packed)].view(NUM_LAYERS, -1)
            event = copier.copy(
                data, pages[turn % NUM_SLOTS], wait_for=event, then=lambda ids: None
            )
        event.synchronize()

    def rate(run: Callable[[], None]) -> float:
        run()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return num_loads * packed[0].nbytes / statistics.median(seconds) / 1e9

    link, scattered = rate(plain), rate(loads)
    return {
        "link_GB_s": round(link, 1),
        "pages_GB_s": round(scattered, 1),
        "share_of_link": round(scattered / link, 3),
    }


def time_loads(setup: Setup, count: int) -> dict[str, float]:
    """One at a time, with nothing beside."""
    times = []
    for _ in range(count):
        setup.begin()
        times.append(setup.finish(30.0))
    return {
        "num_loads": count,
        "load_ms": round(statistics.median(times), 2),
        "load_ms_p90": round(statistics.quantiles(times, n=10)[8], 2),
        "load_ms_max": round(max(times), 2),
    }


def decode_graph(device: torch.device) -> torch.cuda.CUDAGraph:
    """32 layers of matmuls, 15 GB of weights, read once a replay."""
    size = dict(dtype=torch.bfloat16, device=device)
    up = [torch.empty(HIDDEN, 2 * INNER, **size).normal_(std=0.02) for _ in range(NUM_LAYERS)]
    down = [torch.empty(2 * INNER, HIDDEN, **size).normal_(std=0.01) for _ in range(NUM_LAYERS)]
    x = torch.randn(DECODE_ROWS, HIDDEN, **size)

    def run() -> None:
        y = x
        for a, b in zip(up, down, strict=True):
            y = (y @ a) @ b

    graph = capture(run)
    graph.kept = (up, down, x)  # type: ignore[attr-defined]
    return graph


def time_beside(graph: torch.cuda.CUDAGraph, setup: Setup, case: Beside) -> dict[str, float]:
    """Times steps while adapters load, with commands and reports between the launches."""
    ends: deque[torch.cuda.Event] = deque()
    times, loads = [], []
    previous = None
    start = time.perf_counter()
    next_load, num_begun = start, 0
    while (now := time.perf_counter()) < start + case.seconds:
        graph.replay()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
        while case.loads_per_s and now >= next_load and setup.free_slots:
            setup.begin()
            num_begun += 1
            next_load += 1 / case.loads_per_s
        try:
            while True:
                loads.append(setup.finish())
        except queue.Empty:
            pass
        if len(ends) > 2:
            end = ends.popleft()
            end.synchronize()
            if previous is not None:
                times.append(previous.elapsed_time(end))
            previous = end
    while len(loads) < num_begun:
        loads.append(setup.finish(30.0))
    torch.cuda.synchronize()
    cuts = statistics.quantiles(times[10:], n=100)
    return {
        "asked_loads_per_s": case.loads_per_s,
        "loads_per_s": round(len(loads) / case.seconds, 1),
        "from_disk": case.from_disk,
        "num_steps": len(times),
        "step_ms_p50": round(cuts[49], 3),
        "step_ms_p99": round(cuts[98], 3),
        "step_ms_max": round(max(times[10:]), 3),
        "load_ms": round(statistics.median(loads), 2) if loads else 0.0,
        "load_ms_p99": round(statistics.quantiles(loads, n=100)[98], 2) if loads else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--folder", type=Path, help="where 1 GB of adapters is written")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "adapter": f"{MODEL} rank {RANK}, all seven",
    }

    def report(name: str, row: dict[str, float]) -> None:
        print(name, row, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**machine, "case": name, **row}) + "\n")

    print(machine)
    pool = PagePool(PageShape(NUM_LAYERS, 16, 8, 128, torch.bfloat16), 1000, device)
    pool.pages.normal_()
    report("copy", time_copies(pool, 20))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "adapters"
        writer = AdapterWriter(
            model_config(MODEL), ranks=(RANK,), modules=("q", "k", "v", "o", "gate", "up", "down")
        )
        for index in range(NUM_ADAPTERS):
            writer.write(folder / f"{index:02}", index)
        time.sleep(SETTLE_S + 1)  # a file written a moment ago is hashed whenever it is read
        setups = {
            from_disk: Setup(folder, STORE_FEW if from_disk else STORE_ALL, pool)
            for from_disk in (False, True)
        }
        inspected = setups[False].inspect_ms
        report("first inspection", {
            "num_adapters": NUM_ADAPTERS,
            "inspect_ms": round(statistics.median(inspected), 2),
            "inspect_ms_max": round(max(inspected), 2),
        })  # fmt: skip
        report("load from host store", time_loads(setups[False], 40))
        report("load from page cache", time_loads(setups[True], 40))
        graph = decode_graph(device)
        for case in BESIDE:
            report("beside steps", time_beside(graph, setups[case.from_disk], case))
        for setup in setups.values():
            setup.loader.close()


if __name__ == "__main__":
    main()
