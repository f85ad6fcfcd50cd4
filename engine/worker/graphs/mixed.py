"""CUDA graphs of small steps of any kind, in pieces between which attention runs eagerly.

A step with a prompt beside decoding rows cannot be one graph: the launches of attention depend on
the lengths of the prompts. All other launches depend on the number of tokens and the LoRA op's
kind.
"""

from collections.abc import Callable
from functools import partial

import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionOp, AttentionPlan
from loraplex.backends.lora.contract import LoRABatch, LoRAOp, LoRAPlan, LoRATable
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.forward_context import ForwardContext
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

MAX_PIECES_TOKENS = 1024
"""A prompt beside a full batch of decoding rows fits. Larger steps take the GPU longer than the CPU
takes to launch them eagerly."""

MakeContext = Callable[[DeviceInputs, AttentionPlan | None, LoRAPlan | None], ForwardContext]
"""(inputs, attention plan, LoRA plan)."""


def mixed_ladder(max_tokens: int) -> list[int]:
    """Returns the numbers of tokens that are captured, in the order of capture.

    The largest comes first, then ever finer steps between. So if memory or time runs out, the
    finest steps are missing.
    """
    last = min(max_tokens, MAX_PIECES_TOKENS)
    sizes = [size for size in (8, 16, *range(32, last, 32)) if size < last]
    return [last, *sorted(sizes, key=lambda size: (size & -size, size), reverse=True)]


class MixedGraphs:
    """Captures once, then replays over buffers with fixed addresses.

    A step of L layers is L + 1 pieces. Piece 0 gathers the token ids and ends before the first
    layer's attention. Piece i goes from there to before the next layer's. Piece L ends with the
    last norm. Padded rows feed position 0 of page 0, the null page, have no adapter, and get zeros
    from attention.

    Memory. This object owns the buffers that a later piece or eager attention reads: the residual
    stream, the angles, q, attention's output and the last hidden states. They are allocated outside
    the graphs and shared by all of them. K and V lie in the page pool. What a piece itself
    allocates is freed by its end. So the pieces of all sizes and kinds share one memory pool, which
    grows to what the largest piece needs: no replay reads what another left in it. The shared
    buffers belong to one step at a time: steps follow each other on one stream, and the hidden
    states of a step are read on that stream before the next step's first piece.

    Args:
        token_ids: int32, RequestStates.token_ids seen flat.
        max_tokens: tokens of the largest step.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        make_context: MakeContext,
        token_ids: torch.Tensor,
        attention: AttentionOp,
        lora: LoRAOp,
        lora_table: LoRATable,
        max_tokens: int,
    ) -> None:
        self._model = model
        self._make_context = make_context
        self._token_ids = token_ids
        self._attention = attention
        self._lora = lora
        self._lora_table = lora_table
        self._ladder = mixed_ladder(max_tokens)
        largest = self._ladder[0]
        self._inputs = StaticInputs(largest, model.device)
        self._all_inputs = self._inputs.first(largest)
        self._activations = model.make_activations(largest)
        self._hidden = torch.empty_like(self._activations.residual)
        self._graphs: GraphLadder[list[Replay]] = GraphLadder(lora)

    def capture(self, recorder: GraphRecorder) -> str:
        """Capture the ladder until it is done or the recorder is full.

        Returns:
            What was captured, in words.
        """
        self._activations.attended.zero_()
        self._graphs.capture(
            self._ladder, recorder, lambda size, kind: self._capture_one(size, kind, recorder)
        )
        num_pieces = len(self._graphs) * (len(self._model.layers) + 1)
        return f"{num_pieces} pieces of mixed steps{self._graphs.describe('tokens')}"

    def fit(self, num_tokens: int, kind: Kind) -> int:
        """Returns the tokens of the smallest pieces that take a step of `num_tokens`, or 0."""
        return self._graphs.fit(num_tokens, kind)

    def plan(
        self,
        size: int,
        kind: Kind,
        inputs: TokenInputs,
        attention_batch: AttentionBatch,
        lora_batch: LoRABatch,
    ) -> GraphStep:
        """Prepare a step. Its size comes from `fit`, its kind from `kind_of`."""
        self._inputs.upload(inputs)
        attention_plan = self._attention.plan(attention_batch)
        return GraphStep(size, attention_plan, self._plan_lora(kind, lora_batch))

    def replay(self, step: GraphStep, num_tokens: int) -> torch.Tensor:
        """Run a planned step. No other step may be planned between.

        Args:
            num_tokens: without padding, which attention never sees.

        Returns:
            Hidden states [num_tokens, hidden_size], valid until the next replay.
        """
        *pieces, last_piece = self._graphs[step.size, step.kind]
        if num_tokens < step.size:
            # A larger step may have left values there: without zeros, runs would differ in padding.
            self._activations.attended[num_tokens : step.size].zero_()
        activations = self._activations.first(num_tokens)
        ctx = self._make_context(self._all_inputs, step.attention_plan, None)
        for piece, layer in zip(pieces, self._model.layers, strict=True):
            piece()
            layer.attend(activations, ctx)
        last_piece()
        return self._hidden[:num_tokens]

    def _plan_lora(self, kind: Kind, batch: LoRABatch) -> LoRAPlan | None:
        if kind is None:  # BASE
            return None
        return self._lora.plan_graph(table=self._lora_table, batch=batch, kind=kind)

    def _capture_one(self, size: int, kind: Kind, recorder: GraphRecorder) -> list[Replay]:
        """Record one size and kind.

        Only the first two pieces and the last are warmed up: the others launch the kernels of the
        second on other layers.
        """
        self._inputs.clear()
        lora_plan = self._plan_lora(kind, empty_batch(size))
        inputs, activations = self._inputs.first(size), self._activations.first(size)
        ctx = self._make_context(inputs, None, lora_plan)
        hidden, model = self._hidden[:size], self._model

        def start() -> None:
            model.start(self._token_ids.index_select(0, inputs.places), activations, ctx)

        def finish() -> None:
            hidden.copy_(model.finish(activations, ctx))

        between: list[Callable[[], None]] = [
            partial(model.resume, index, activations, ctx) for index in range(len(model.layers) - 1)
        ]
        first = [recorder.record(run, warm_up=True) for run in (start, *between[:1])]
        rest = [recorder.record(run, warm_up=False) for run in between[1:]]
        return [*first, *rest, recorder.record(finish, warm_up=True)]
