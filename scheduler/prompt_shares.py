"""Divides a step's token budget among prompts that are not computed to their end.

The bound: with budget B left after the decode rows, the first prompt in order gets at least half of
B, or all it needs. The others, and one more if requests wait, share the rest equally; a prompt that
needs less leaves its part to them. At most MAX_PARTIAL_PROMPTS are computed in part at one time. So
a prompt of n tokens beside k others ends within ceil(n / floor(floor(B / 2) / k)) steps of its
start, and the first in order takes at most twice the steps that it takes alone. What the shares
leave is given out in order, so no step is smaller than first come, first served makes it.
"""

from collections.abc import Sequence

MAX_PARTIAL_PROMPTS = 4
"""Prompts that are computed in part at one time. Each gets an eighth of a step or more."""


def prompt_shares(num_left: Sequence[int], budget: int, *, newcomers: bool) -> list[int]:
    """Returns the tokens of each prompt, in order; their sum is at most `budget`.

    Args:
        num_left: tokens that each prompt has left, in order.
        budget: tokens that the step can still take.
        newcomers: requests wait that may start in this step; a share is kept for them.
    """
    if not num_left:
        return []
    shares = [0] * len(num_left)
    shares[0] = min(num_left[0], budget - budget // 2)
    rest, num_sharers = budget - shares[0], len(num_left) - 1 + newcomers
    for index in sorted(range(1, len(num_left)), key=lambda index: num_left[index]):
        shares[index] = min(num_left[index], rest // num_sharers)
        rest -= shares[index]
        num_sharers -= 1
    return shares
