"""Beam search over the answers of an engine; classes, fields and scores are vLLM's."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from loraplex.engine.frontend.sampling_params import MAX_LOGPROBS, SamplingParams
from loraplex.entrypoints.client.lora_mix import LoRA
from loraplex.entrypoints.client.outputs import PositionLogprobs, RequestOutput
from loraplex.entrypoints.offline.batch_request import BatchRequest

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
RunBatch = Callable[[list[BatchRequest]], list[RequestOutput]]


@dataclass(slots=True, kw_only=True)
class BeamSearchParams:
    """Selects the width and the length of a beam search.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0  # a beam's score is its logprob / its length ** length_penalty
    include_stop_str_in_output: bool = False  # accepted, means nothing here and in vLLM

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise ValueError(
                f"beam_width must lie in [1, {MAX_BEAM_WIDTH}], got {self.beam_width}: a step asks "
                f"for twice as many logprobs, of which there are at most {MAX_LOGPROBS}"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam: its tokens with the prompt's, and the log-probability of the tokens after it."""

    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)  # one for each new token
    lora_request: LoRA | None = None
    cum_logprob: float = 0.0
    text: str | None = None  # of all tokens, special ones too; set at the end
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best beams of one prompt, the best one first."""

    sequences: list[BeamSearchSequence]


class BeamSearch:
    """The beams of one prompt: those that go on and those that have ended."""

    def __init__(
        self,
        request: BatchRequest,
        token_ids: Sequence[int],
        params: BeamSearchParams,
        *,
        eos_token_ids: Collection[int],
        max_model_len: int,
    ) -> None:
        """Begins with the prompt. The request's sampling parameters are not used."""
        self.beams = [BeamSearchSequence(list(token_ids), lora_request=request.adapter)]
        self._request = request
        self._params = params
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._ended: list[BeamSearchSequence] = []

    def requests(self) -> list[BatchRequest]:
        """Returns a request of one token for each beam that goes on."""
        params = SamplingParams(
            logprobs=2 * self._params.beam_width,
            max_tokens=1,
            temperature=self._params.temperature,
            ignore_eos=True,
            detokenize=False,
        )
        own = self._request
        return [
            BatchRequest(
                {"prompt_token_ids": beam.tokens}, params, own.adapter, own.priority, own.salt
            )
            for beam in self.beams
        ]

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Replaces the beams by their best continuations; `outputs` answer requests()."""
        grown: list[BeamSearchSequence] = []
        for beam, output in zip(self.beams, outputs, strict=True):
            (logprobs,) = output.outputs[0].logprobs or ()
            for token_id, logprob in logprobs.items():
                longer = BeamSearchSequence(
                    [*beam.tokens, token_id],
                    [*beam.logprobs, logprobs],
                    beam.lora_request,
                    beam.cum_logprob + logprob.logprob,
                )
                if token_id in self._eos_token_ids and not self._params.ignore_eos:
                    longer.finish_reason = "stop"
                    self._ended.append(longer)
                else:
                    grown.append(longer)
        grown.sort(key=self._score, reverse=True)
        self.beams = grown[: self._params.beam_width]
        if self.beams and len(self.beams[0].tokens) >= self._max_model_len:
            self._end_all()

    def output(self) -> BeamSearchOutput:
        """Returns the best beams, ended or not."""
        self._end_all()
        self._ended.sort(key=self._score, reverse=True)
        return BeamSearchOutput(self._ended[: self._params.beam_width])

    def _end_all(self) -> None:
        for beam in self.beams:
            beam.finish_reason = "length"
        self._ended += self.beams
        self.beams = []

    def _score(self, beam: BeamSearchSequence) -> float:
        """Divides the log-probability by the length with the prompt, but without an end token."""
        length = len(beam.tokens) - (beam.tokens[-1] in self._eos_token_ids)
        return float(beam.cum_logprob / length**self._params.length_penalty)


def run_beam_searches(
    searches: Sequence[BeamSearch], max_tokens: int, run: RunBatch, on_step: Callable[[], object]
) -> None:
    """Advances the searches together until `max_tokens` tokens or until all beams have ended.

    Args:
        run: answers a batch of requests in their order.
        on_step: called after each token.
    """
    for _ in range(max_tokens):
        batches = [search.requests() for search in searches]
        if not any(batches):
            return
        outputs = iter(run([request for batch in batches for request in batch]))
        for search, batch in zip(searches, batches, strict=True):
            search.advance([next(outputs) for _ in batch])
        on_step()
