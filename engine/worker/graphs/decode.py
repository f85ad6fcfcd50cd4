"""CUDA graphs of the decode step, for each number of rows of a ladder and each LoRA kind."""

from collections.abc import Callable

import numpy as np
import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionOp
from loraplex.backends.lora.contract import LoRABatch, LoRAOp, LoRATable
from loraplex.engine.worker.graphs.capture import (
    BASE,
    DeviceInputs,
    GraphLadder,
    GraphRecorder,
    Kind,
    Replay,
    StaticInputs,
    empty_batch,
)
from loraplex.engine.worker.step_rows import TokenInputs

MAX_GRAPH_ROWS = 512
"""Larger steps keep the GPU busy for longer than the CPU takes to launch them one by one."""

Forward = Callable[[DeviceInputs, bool, torch.Tensor], None]
"""(inputs, has_lora, logits): a decode step whose logits go to `logits` [rows, vocabulary]."""


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
        self._inputs = StaticInputs(len(logits), logits.device)
        self._graphs: GraphLadder[Replay] = GraphLadder(lora)

    def capture(self, recorder: GraphRecorder) -> str:
        """Capture the ladder, largest first, until it is done or the recorder is full.

        Returns:
            What was captured, in words.
        """
        ladder = decode_ladder(len(self.logits))
        self._graphs.capture(
            reversed(ladder), recorder, lambda rows, kind: self._capture_one(rows, kind, recorder)
        )
        return f"{len(self._graphs)} CUDA graphs of decode steps{self._graphs.describe('rows')}"

    def fit(self, num_rows: int, kind: Kind) -> int:
        """The rows of the smallest graph that takes a step of `num_rows`; 0: none does."""
        return self._graphs.fit(num_rows, kind)

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
        self._inputs.upload(inputs)
        self._attention.plan_graph(attention_batch, size)
        if kind is not BASE:
            self._lora.plan(table=self._lora_table, batch=lora_batch, kind=kind)

    def replay(self, size: int, kind: Kind) -> torch.Tensor:
        """Run the planned step; logits [size, vocabulary], valid until the next."""
        self._graphs[size, kind]()
        return self.logits[:size]

    def _capture_one(self, rows: int, kind: Kind, recorder: GraphRecorder) -> Replay:
        ones, page_table = np.ones(rows, dtype=np.int32), np.zeros((rows, 1), dtype=np.int32)
        self._inputs.clear()
        self._attention.plan_graph(AttentionBatch(ones, ones, rows, page_table), rows)
        if kind is not BASE:
            self._lora.plan(table=self._lora_table, batch=empty_batch(rows), kind=kind)
        inputs, logits = self._inputs.first(rows), self.logits[:rows]
        return recorder.record(
            lambda: self._forward(inputs, kind is not BASE, logits), warm_up=True
        )
