"""Expected outputs of one request that a scheduler has accepted."""

from dataclasses import dataclass, field

from loraplex.scheduler.frontend_protocol import SequenceOutput
from loraplex.scheduler.worker_protocol import SamplingSpec

from helpers.fakes.fake_model import Weights, last_place
from helpers.fakes.fake_worker import FakeAdapter


@dataclass
class Expectation:
    """A request that was accepted, and what has come of it."""

    prompt: list[int]
    sampling: SamplingSpec
    path: str  # of its adapter when it was added; empty for the base or a mix
    token_ids: list[int] = field(default_factory=list)
    end: SequenceOutput | None = None
    aborted: bool = False
    num_logprobs: int = 0
    num_prompt_logprobs: int = 0
    num_cached_tokens: int = 0
    mix: list[tuple[str, float]] = field(default_factory=list)  # path and weight

    def weights(self, files: dict[str, FakeAdapter]) -> Weights:
        """Returns the weights of each token, see oracle()."""
        weights: Weights = []
        for path, weight in self.mix or [(self.path, 1.0)]:
            if path:
                first = last_place(self.prompt, files[path].invocation)
                factor = "" if weight == 1 else f" * {weight}"
                weights.append((first, files[path].content + factor))
        return sorted(weights)
