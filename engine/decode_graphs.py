"""CUDA graphs of the decode step, for each number of rows of a ladder, with LoRA and without."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionOp
from loraplex.backends.lora.contract import LoRABatch, LoRAOp, LoRATable
from loraplex.backends.staging import Staging
from loraplex.engine.config import GraphConfig
from loraplex.engine.step_rows import TokenInputs

MAX_GRAPH_ROWS = 512
"""Larger steps keep the GPU busy for longer than the CPU takes to launch them one by one."""


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """TokenInputs on the device: int64 [T] each."""

    places: torch.Tensor
    positions: torch.Tensor
    kv_rows: torch.Tensor


Forward = Callable[[DeviceInputs, bool, torch.Tensor], None]
"""(inputs, has_lora, logits): a decode step whose logits go to `logits` [rows, vocabulary]."""

Kind = str | None
"""Of a graph: one of the LoRA op's, or BASE."""

BASE: Kind = None
"""Of a step without adapters. It equals no kind that an op may name: a step with adapters that was
given this graph would be answered by the base model."""


def decode_ladder(max_rows: int) -> list[int]:
    """Numbers of rows that are captured; a step of fewer is padded to the next."""
    last = min(max_rows, MAX_GRAPH_ROWS)
    steps = (1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, last, 32))
    return [*(rows for rows in steps if rows < last), last]


class DecodeGraphs:
    """Captures once, then replays over buffers whose addresses stay.

    Padded rows feed position 0 of page 0, the null page, and have no adapter.

    Attributes:
        logits: [max rows, vocabulary], where every graph writes.
    """

    def __init__(
        self,
        *,
        forward: Forward,
        attention: AttentionOp,
        lora: LoRAOp,
        lora_table: LoRATable,
        logits: torch.Tensor,
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._lora = lora
        self._lora_table = lora_table
        self.logits = logits
        self._max_rows = len(logits)
        device = logits.device
        self._staging = Staging(device)
        self._inputs = torch.zeros(3, self._max_rows + self._max_rows % 2, dtype=torch.int64)
        self._inputs = self._inputs.to(device)
        self._sizes: list[int] = []
        self._graphs: dict[tuple[int, Kind], torch.cuda.CUDAGraph] = {}

    @property
    def max_rows(self) -> int:
        """Rows of the largest graph; 0: there is none."""
        return max(self._sizes, default=0)

    def capture(self, config: GraphConfig) -> str:
        """Capture the ladder, largest first, until it is done or its time or memory is spent.

        Returns:
            One line that says what was captured, in how many seconds and bytes.
        """
        device = self.logits.device
        started_at, free = time.perf_counter(), torch.cuda.mem_get_info(device)[0]
        kinds = (*self._lora.graph_kinds, BASE)
        pool, used, why = torch.cuda.graph_pool_handle(), 0, ""
        for rows in reversed(decode_ladder(self._max_rows)):
            for kind in kinds if rows <= self._lora.max_graph_rows else (BASE,):
                self._graphs[rows, kind] = self._capture_one(rows, kind, pool)
            self._sizes.insert(0, rows)
            torch.cuda.synchronize(device)
            used = free - torch.cuda.mem_get_info(device)[0]
            if time.perf_counter() - started_at > config.graph_seconds:
                why = f", then the time ({config.graph_seconds:g} s) was up"
            elif used > config.graph_bytes:
                why = f", then the memory ({config.graph_bytes >> 20} MiB) was full"
            if why:
                break
        seconds = time.perf_counter() - started_at
        return (
            f"captured {len(self._graphs)} CUDA graphs of {self._sizes[0]} to {self.max_rows} rows "
            f"in {seconds:.1f} s and {used >> 20} MiB{why}"
        )

    def kind_of(self, lora_batch: LoRABatch) -> Kind:
        """The kind of graph that a step needs."""
        return BASE if lora_batch.is_empty else self._lora.kind_of(lora_batch)

    def fit(self, num_rows: int, kind: Kind) -> int:
        """The rows of the smallest graph that takes a step of `num_rows`; 0: none does."""
        if num_rows > self.max_rows:
            return 0
        size = self._sizes[int(np.searchsorted(self._sizes, num_rows))]
        return size if (size, kind) in self._graphs else 0

    def plan(
        self,
        size: int,
        kind: Kind,
        inputs: TokenInputs,
        attention_batch: AttentionBatch,
        lora_batch: LoRABatch,
    ) -> None:
        """Hand a decode step to a graph, whose size comes from `fit` and whose kind from
        `kind_of`."""
        self._upload(inputs)
        self._attention.plan_graph(attention_batch, size)
        if kind is not BASE:
            self._lora.plan(table=self._lora_table, batch=lora_batch, kind=kind)

    def replay(self, size: int, kind: Kind) -> torch.Tensor:
        """Run the planned step; logits [size, vocabulary], valid until the next."""
        self._graphs[size, kind].replay()
        return self.logits[:size]

    def _upload(self, inputs: TokenInputs) -> None:
        host = np.zeros(tuple(self._inputs.shape), dtype=np.int64)
        for row, values in enumerate((inputs.places, inputs.positions, inputs.kv_rows)):
            host[row, : len(values)] = values
        self._staging.upload({"inputs": host}, out=self._inputs.view(-1).view(torch.uint8))

    def _capture_one(self, rows: int, kind: Kind, pool: Any) -> torch.cuda.CUDAGraph:
        """Run once to compile and to warm up what libraries set up on first use, then capture."""
        ones, none = np.ones(rows, dtype=np.int32), np.zeros(0, dtype=np.int32)
        page_table = np.zeros((rows, 1), dtype=np.int32)
        self._inputs.zero_()
        self._attention.plan_graph(AttentionBatch(ones, ones, rows, page_table), rows)
        if kind is not BASE:
            batch = LoRABatch(rows, none, np.zeros(1, dtype=np.int32), none)
            self._lora.plan(table=self._lora_table, batch=batch, kind=kind)
        inputs = DeviceInputs(*(part[:rows] for part in self._inputs))
        logits, graph = self.logits[:rows], torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(self.logits.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(inputs, kind is not BASE, logits)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=pool):
            self._forward(inputs, kind is not BASE, logits)
        return graph
