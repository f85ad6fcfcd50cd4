"""CUDA graphs of the decode step, for each number of rows of a ladder and each LoRA kind."""

from collections.abc import Callable

import numpy as np
import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionOp, AttentionPlan
from loraplex.backends.lora.contract import LoRABatch, LoRAOp, LoRAPlan, LoRATable
from loraplex.backends.lora.vectors.op import rare_kinds
from loraplex.engine.worker.graphs.capture import (
    DeviceInputs,
    GraphLadder,
    GraphRecorder,
    GraphStep,
    Kind,
    Replay,
    StaticInputs,
    empty_batch,
)
from loraplex.engine.worker.step_rows import TokenInputs

MAX_GRAPH_ROWS = 512
"""The GPU takes longer for larger steps than the CPU takes to launch them operator by operator."""

RARE_ROWS = (8, 32, 64, 128, 256)
"""Numbers of rows, besides the largest, for which graphs of rare kinds are captured."""

Forward = Callable[[DeviceInputs, AttentionPlan, LoRAPlan | None, torch.Tensor], None]
"""(inputs, attention plan, LoRA plan, logits): runs a decode step and writes its logits to `logits`
[rows, vocabulary]."""


def decode_ladder(max_rows: int) -> list[int]:
    """Returns the numbers of rows that are captured. Other steps are padded to the next one."""
    last = min(max_rows, MAX_GRAPH_ROWS)
    steps = (1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, last, 32))
    return [*(rows for rows in steps if rows < last), last]


class DecodeGraphs:
    """Captures once, then replays over buffers with fixed addresses.

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

    def capture_rare(self, recorder: GraphRecorder) -> None:
        """Capture the kinds that few steps need, after everything else and for few sizes.

        A step in between is padded to the next size. One that finds none runs eagerly.
        """
        largest = len(self.logits)
        self._graphs.capture(
            [largest, *(rows for rows in reversed(RARE_ROWS) if rows < largest)],
            recorder,
            lambda rows, kind: self._capture_one(rows, kind, recorder),
            kinds=rare_kinds(self._lora),
        )

    def fit(self, num_rows: int, kind: Kind) -> int:
        """Returns the rows of the smallest graph that takes a step of `num_rows`, or 0."""
        return self._graphs.fit(num_rows, kind)

    def plan(
        self,
        size: int,
        kind: Kind,
        inputs: TokenInputs,
        attention_batch: AttentionBatch,
        lora_batch: LoRABatch,
    ) -> GraphStep:
        """Prepare a decode step. Its size comes from `fit`, its kind from `kind_of`."""
        self._inputs.upload(inputs)
        return self._plan(size, kind, attention_batch, lora_batch)

    def replay(self, step: GraphStep) -> torch.Tensor:
        """Run a planned step. Returns logits [step.size, vocabulary], valid until the next replay.

        No other step may be planned between.
        """
        self._graphs[step.size, step.kind]()
        return self.logits[: step.size]

    def _plan(
        self, size: int, kind: Kind, attention_batch: AttentionBatch, lora_batch: LoRABatch
    ) -> GraphStep:
        attention_plan = self._attention.plan_graph(attention_batch, size)
        if kind is None:  # BASE
            return GraphStep(size, attention_plan, None)
        lora_plan = self._lora.plan_graph(table=self._lora_table, batch=lora_batch, kind=kind)
        return GraphStep(size, attention_plan, lora_plan)

    def _capture_one(self, rows: int, kind: Kind, recorder: GraphRecorder) -> Replay:
        ones, page_table = np.ones(rows, dtype=np.int32), np.zeros((rows, 1), dtype=np.int32)
        self._inputs.clear()
        batch = AttentionBatch(ones, ones, rows, page_table)
        step = self._plan(rows, kind, batch, empty_batch(rows))
        inputs, logits = self._inputs.first(rows), self.logits[:rows]
        return recorder.record(
            lambda: self._forward(inputs, step.attention_plan, step.lora_plan, logits),
            warm_up=True,
        )
