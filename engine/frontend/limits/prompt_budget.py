"""Limits the memory of unfinished requests' prompts."""

from loraplex.engine.errors import QueueFullError
from loraplex.engine.frontend.byte_budget import ByteBudget
from loraplex.engine.frontend.sampling_params import SamplingParams

MAX_PROMPTS = 256 << 20  # bytes that unfinished requests hold in all
MAX_CLIENT_PROMPTS = 64 << 20


class PromptBudget:
    """Counts the bytes that each payer's unfinished requests hold, and all together."""

    def __init__(self) -> None:
        self._held = ByteBudget(for_each=MAX_CLIENT_PROMPTS, in_all=MAX_PROMPTS)

    @property
    def total(self) -> int:
        return self._held.total

    def take(self, payer: bytes, num_bytes: int) -> None:
        """Raises QueueFullError if the payer or all hold too much."""
        if not self._held.take(payer, num_bytes):
            raise QueueFullError(
                "the unfinished requests hold too much memory: send this one after others have "
                "finished"
            )

    def give_back(self, payer: bytes, num_bytes: int) -> None:
        self._held.give_back(payer, num_bytes)


def prompt_bytes(params: SamplingParams, num_prompt_tokens: int) -> int:
    """Returns about how much memory the unfinished request holds in frontend and scheduler."""
    stops = sum(map(len, params.stop_strings)) + 8 * len(params.stop_token_ids or ())
    return (
        4 * num_prompt_tokens * (1 + params.n)
        + 1024 * params.n
        + stops
        + (100 * len(params.logit_bias or ()))
        + (4 * params.n * len(params.allowed_token_ids or ()))
        + (8 * params.n * sum(map(len, params.bad_words or ())))
    )
