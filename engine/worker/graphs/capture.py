"""Parts shared by the graphs of decode steps and the pieces of mixed steps."""

import gc
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from loraplex.backends.attention.contract import AttentionPlan
from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.contract import LoRABatch, LoRAOp, LoRAPlan, LoRATable
from loraplex.engine.config import GraphConfig
from loraplex.engine.worker.step_rows import TokenInputs

Kind = str | None
"""The kind of a graph: one of the LoRA op's, or BASE."""

BASE: Kind = None
"""The kind of steps without adapters. No op's kind may equal it: this graph would answer a step
with adapters by the base model."""

Replay = Callable[[], None]
"""Runs what was recorded, on torch's current stream."""


def kind_of(lora: LoRAOp, table: LoRATable, batch: LoRABatch) -> Kind:
    """Returns the kind of graph that a step needs."""
    return BASE if batch.is_empty else lora.kind_of(table=table, batch=batch)


def empty_batch(num_tokens: int) -> LoRABatch:
    """Returns a batch without adapters, with which a kind is planned before its capture."""
    none = np.zeros(0, dtype=np.int32)
    return LoRABatch(num_tokens, none, np.zeros(1, dtype=np.int32), none)


@dataclass(frozen=True, slots=True)
class GraphStep:
    """A step that is planned for a graph, or for pieces of one."""

    size: int  # rows or tokens that were captured
    attention_plan: AttentionPlan
    lora_plan: LoRAPlan | None  # None: no row has an adapter

    @property
    def kind(self) -> Kind:
        return BASE if self.lora_plan is None else self.lora_plan.kind


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """TokenInputs on the device: int64 [T] each."""

    places: torch.Tensor
    positions: torch.Tensor
    kv_rows: torch.Tensor


class StaticInputs:
    """TokenInputs at fixed addresses. Padded rows feed position 0 of page 0, the null page."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._uploader = Uploader(device)
        even = max_rows + max_rows % 2  # each of the three starts at 16 bytes
        self._inputs = torch.zeros(3, even, dtype=torch.int64, device=device)

    def first(self, num_rows: int) -> DeviceInputs:
        return DeviceInputs(*(part[:num_rows] for part in self._inputs))

    def upload(self, inputs: TokenInputs) -> None:
        host = np.zeros(tuple(self._inputs.shape), dtype=np.int64)
        for row, values in enumerate((inputs.places, inputs.positions, inputs.kv_rows)):
            host[row, : len(values)] = values
        self._uploader.upload({"inputs": host}, out=self._inputs.view(-1).view(torch.uint8))

    def clear(self) -> None:
        """Turn all rows into padding."""
        self._inputs.zero_()


class GraphRecorder:
    """Records CUDA graphs on one stream, in one private memory pool that all of them share.

    Memory that a graph allocates and frees serves the graphs recorded after it. So any two graphs
    may use the same memory. Nothing allocated in one may be read after another has been replayed,
    and replays must follow each other on one stream.
    """

    def __init__(self, device: torch.device, config: GraphConfig) -> None:
        gc.collect()  # a finalizer that runs during a capture may do what no capture allows
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self._device = device
        self._config = config
        self._started_at = time.perf_counter()
        self._free = torch.cuda.mem_get_info(device)[0]
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._why = ""

    @property
    def is_full(self) -> bool:
        """Returns whether the time is up or the memory full. Waits for the GPU."""
        if not self._why:
            torch.cuda.synchronize(self._device)
            if time.perf_counter() - self._started_at > self._config.graph_seconds:
                self._why = f", then the time ({self._config.graph_seconds:g} s) was up"
            elif self._used_bytes() > self._config.graph_bytes:
                self._why = f", then the memory ({self._config.graph_bytes >> 20} MiB) was full"
        return bool(self._why)

    def record(self, run: Callable[[], None], *, warm_up: bool) -> Replay:
        """Record what `run` launches.

        Args:
            warm_up: run it once before, so that kernels are compiled and libraries set up.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would synchronize and empty the allocator's cache each time.
        with torch.cuda.stream(self._stream):
            if warm_up:
                run()
            # Other threads page-lock host memory meanwhile, which a global capture would forbid.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        replay: Replay = graph.replay
        return replay

    def finish(self) -> str:
        """Free what warming up has left. Returns what was spent, and the bound that was reached."""
        torch.cuda.empty_cache()
        seconds = time.perf_counter() - self._started_at
        return f"in {seconds:.1f} s and {self._used_bytes() >> 20} MiB{self._why}"

    def _used_bytes(self) -> int:
        return int(self._free - torch.cuda.mem_get_info(self._device)[0])


Captured = TypeVar("Captured")


class GraphLadder(Generic[Captured]):
    """The captured graphs, by number of rows and kind."""

    def __init__(self, lora: LoRAOp) -> None:
        self._lora = lora
        self._sizes: dict[Kind, list[int]] = {}
        self._graphs: dict[tuple[int, Kind], Captured] = {}

    def describe(self, unit: str) -> str:
        """Returns the range of sizes, to be appended to a sentence."""
        sizes = self._sizes.get(BASE)
        return f" of {sizes[0]} to {sizes[-1]} {unit}" if sizes else ""

    def __len__(self) -> int:
        return len(self._graphs)

    def __getitem__(self, key: tuple[int, Kind]) -> Captured:
        return self._graphs[key]

    def capture(
        self,
        sizes: Iterable[int],
        recorder: GraphRecorder,
        capture_one: Callable[[int, Kind], Captured],
        kinds: Sequence[Kind] | None = None,
    ) -> None:
        """Capture each size with all kinds, in this order, until the recorder is full.

        Args:
            kinds: None: all of the op but its rare ones, and BASE.
        """
        kinds = (*self._lora.graph_kinds, BASE) if kinds is None else kinds
        for size in sizes:
            if recorder.is_full:
                return
            is_large = size > self._lora.max_graph_rows
            for kind in kinds:
                if is_large and kind is not BASE:
                    continue
                self._graphs[size, kind] = capture_one(size, kind)
                insort(self._sizes.setdefault(kind, []), size)

    def fit(self, num_rows: int, kind: Kind) -> int:
        """Returns the smallest size that takes `num_rows`; 0 if there is none of this kind."""
        sizes = self._sizes.get(kind, [])
        index = bisect_left(sizes, num_rows)
        return sizes[index] if index < len(sizes) else 0
