"""CUDA graphs of small steps of any kind, in pieces between which attention runs eagerly.

Steps that hold a prompt beside decoding rows cannot be one graph: what attention launches depends
on the lengths of the prompts. All else depends on the number of tokens and the LoRA op's kind.
"""

from collections.abc import Callable
from functools import partial

import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionOp
from loraplex.backends.lora.contract import LoRABatch, LoRAOp, LoRATable
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.forward_context import ForwardContext
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

MAX_PIECES_TOKENS = 512
"""Of larger steps the GPU takes about as long as the CPU does to launch them one by one."""

MakeContext = Callable[[DeviceInputs, bool], ForwardContext]
"""(inputs, has_lora)."""


def mixed_ladder(max_tokens: int) -> list[int]:
    """Numbers of tokens that are captured, in the order of capture: the largest, then ever finer
    steps, so that the bounds of memory and time leave out the finest."""
    last = min(max_tokens, MAX_PIECES_TOKENS)
    sizes = [size for size in (8, 16, *range(32, last, 32)) if size < last]
    return [last, *sorted(sizes, key=lambda size: (size & -size, size), reverse=True)]


class MixedGraphs:
    """Captures once, then replays over buffers whose addresses stay.

    A step of L layers is L + 1 pieces: piece 0 gathers the token ids and ends before the first
    layer's attention, piece i goes from there to before the next layer's, piece L ends with the
    last norm. Padded rows feed position 0 of page 0, the null page, have no adapter, and get zeros
    from attention.

    Memory. What a later piece or eager attention reads (the residual stream, the angles, q,
    attention's output, the last hidden states) lies in buffers of this object, allocated outside
    the graphs and shared by all of them; K and V lie in the page pool. Whatever a piece allocates
    itself is dead by its end. So all pieces of all sizes and kinds can share one memory pool,
    which comes to hold what the largest piece needs: a replay finds nothing in it that it reads,
    and leaves nothing in it that is read later. The shared buffers belong to one step at a time:
    steps follow each other on one stream, and what a step leaves in them (the hidden states) is
    consumed on that stream before the next one's first piece.

    Args:
        token_ids: int32, RequestStates.token_ids seen flat.
        max_tokens: of the largest step there may be.
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
        self._activations = model.make_activations(largest)
        self._hidden = torch.empty_like(self._activations.residual)
        self._eager_context = make_context(self._inputs.first(largest), False)
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
        """The tokens of the smallest pieces that take a step of `num_tokens`; 0: none do."""
        return self._graphs.fit(num_tokens, kind)

    def plan(
        self,
        kind: Kind,
        inputs: TokenInputs,
        attention_batch: AttentionBatch,
        lora_batch: LoRABatch,
    ) -> None:
        """Prepare a step that `fit`; its kind comes from `kind_of`."""
        self._inputs.upload(inputs)
        self._attention.plan(attention_batch)
        if kind is not BASE:
            self._lora.plan(table=self._lora_table, batch=lora_batch, kind=kind)

    def replay(self, size: int, kind: Kind, num_tokens: int) -> torch.Tensor:
        """Run the planned step; hidden states [num_tokens, hidden_size], valid until the next.

        Args:
            size: from `fit`.
            num_tokens: without padding, which attention never sees.
        """
        *pieces, last_piece = self._graphs[size, kind]
        if num_tokens < size:
            # What a larger step left there would do no harm but to be other in each run.
            self._activations.attended[num_tokens:size].zero_()
        activations = self._activations.first(num_tokens)
        for piece, layer in zip(pieces, self._model.layers, strict=True):
            piece()
            layer.attend(activations, self._eager_context)
        last_piece()
        return self._hidden[:num_tokens]

    def _capture_one(self, size: int, kind: Kind, recorder: GraphRecorder) -> list[Replay]:
        """The pieces but the first two and the last launch the kernels of the second, on other
        layers: they need no warm-up of their own."""
        self._inputs.clear()
        if kind is not BASE:
            self._lora.plan(table=self._lora_table, batch=empty_batch(size), kind=kind)
        inputs, activations = self._inputs.first(size), self._activations.first(size)
        ctx = self._make_context(inputs, kind is not BASE)
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
