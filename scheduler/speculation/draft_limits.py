"""Bounds the drafts of a step, so that they take little time and nothing from other rows."""

from collections.abc import Iterable

from loraplex.scheduler.request import Request
from loraplex.scheduler.speculation.speculation_config import SpeculationConfig

MAX_SAMPLED = 256
"""Tokens that a step with drafts samples at most. Up to about so many, a step takes the time to
read the weights. Workers also size the buffers of split logits by it."""

MIN_DRAFTS = 2
"""Drafts that each running request must have room for, or none drafts: a row that verifies misses
a step while it waits for its last result."""


def max_drafts(config: SpeculationConfig | None, num_running: int) -> int:
    """Returns how many drafts each running request may have in a step; 0: none drafts."""
    if config is None or not num_running:
        return 0
    room = MAX_SAMPLED // num_running - 1
    return 0 if room < MIN_DRAFTS else min(room, config.num_speculative_tokens)


def waits_for_result(request: Request, drafts: int) -> bool:
    """True if the request's next row depends on what a step in flight or a mask brings.

    Args:
        drafts: see max_drafts. With 0 a request goes on without drafts.
    """
    depends = request.constraint is not None or request.is_verifying or (drafts and request.drafts)
    return bool(depends) and (request.has_tokens_in_flight or request.awaits_mask)


def most_wait(running: Iterable[Request], drafts: int) -> bool:
    """True if at least half of the requests that speculate or not wait for a result.

    A step without them would take as long as one with all, and they would then go on in turns, each
    in every other step.
    """
    num_waiting = num_ready = 0
    for request in running:
        if (request.drafts or request.is_verifying) and waits_for_result(request, drafts):
            num_waiting += 1
        else:
            num_ready += 1
    return num_waiting > 0 and num_waiting >= num_ready
