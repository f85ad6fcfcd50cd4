"""The contract of what restricts the next token of a sequence."""

from array import array
from typing import Protocol


class Constraint(Protocol):
    """Follows one sequence and knows which tokens may come next.

    Attributes:
        mask: ``array("i")`` with a bit for each token, as StepPlan.masks has it. None while it is
            computed for the last known token; the sequence takes part in no step until then.
    """

    mask: "array[int] | None"

    def advance(self, token_id: int) -> None:
        """Take the next token. Returns at once; `mask` follows."""
        ...
