"""Needs of a request that is to be placed."""

from dataclasses import dataclass

from loraplex.scheduler.placement.engine_summary import EngineSummary


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """Needs of one request.

    Attributes:
        content_hash: of its adapter; "" is the base model.
        pages: for its known tokens, and for its adapter where that is not resident.
        num_candidates: engines that its adapter's demand needs.
        home: what its engines are found by; default: the content hash. It may not change once the
            content hash becomes known.
        objective_s: seconds within which its first token is wanted.
    """

    content_hash: str
    prompt_tokens: int
    pages: int
    num_candidates: int = 1
    objective_s: float = 6.0
    home: str = ""

    def first_token_seconds(self, engine: EngineSummary) -> float:
        """Predicts the first token: queue and prompt beside the adapter's load, then one step."""
        tokens = engine.waiting_tokens + self.prompt_tokens
        rate = engine.prefill_tokens_per_second
        prefill = tokens / rate if rate else 0.0
        step = 1 / engine.steps_per_second if engine.steps_per_second else 0.0
        return max(prefill, engine.seconds_to_load(self.content_hash)) + step
