"""One sequence as the router sees it."""

from array import array
from dataclasses import dataclass, field

from loraplex.scheduler.frontend_protocol import AdapterSource, AddRequest, MixPart, SequenceOutput


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """A sequence, what it has generated so far, and the engine that has it now.

    Attributes:
        message: as the frontend sent it.
        order: of arrival.
        source: folder that the adapter's name meant when the request came, if it is known.
        mix: the parts of its mix with such folders.
        engine_id: empty while it waits for an engine.
        num_deaths: engines that died or hung while they had it.
        attempt: id under which the engine knows it; another one each time it is sent.
        num_scored: prompt log-probabilities that were passed on.
        num_to_skip: log-probabilities that the present attempt brings again.
    """

    message: AddRequest
    order: int
    arrived_at: float
    generated: "array[int]" = field(default_factory=lambda: array("i"))
    source: AdapterSource | None = None
    mix: list[MixPart] = field(default_factory=list)
    engine_id: str = ""
    was_sent: bool = False
    num_deaths: int = 0
    attempt: int = 0
    num_scored: int = 0
    num_to_skip: int = 0

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and answer."""
        return len(self.message.prompt_token_ids) + len(self.generated)

    def take(self, output: SequenceOutput) -> SequenceOutput:
        """Counts an output of the present attempt; returns it as the frontend expects it."""
        self.generated.extend(output.token_ids)
        num_known = min(self.num_to_skip, len(output.prompt_logprobs))
        self.num_to_skip -= num_known
        fresh = output.prompt_logprobs[num_known:]
        self.num_scored += len(fresh)
        output.request_id = self.message.request_id
        output.prompt_logprobs = fresh
        return output
