"""The rows of a step on the CPU: the tokens they feed, their positions, the places of K and V."""

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.scheduler.worker_protocol import StepPlan

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """B rows of T tokens, N of which sample."""

    slots: Int32Array  # [B]
    positions: Int32Array  # [B], of the first token
    num_tokens: Int32Array  # [B]
    starts: Int64Array  # [B + 1], of each row's tokens
    sampling: Int64Array  # [N], which rows sample
    next_positions: Int32Array  # [N], where their tokens will stand

    @property
    def is_decode(self) -> bool:
        """Whether every row feeds one token and samples the next."""
        return len(self.sampling) == len(self.slots) == self.starts[-1]

    @property
    def num_decodes(self) -> int:
        """The number of leading rows that feed one token."""
        return int(np.argmax(np.append(self.num_tokens, 0) != 1))

    @property
    def kv_lens(self) -> Int32Array:
        """[B], context lengths once the step's K and V are written."""
        return self.positions + self.num_tokens


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """The model's inputs for each of T tokens."""

    places: Int64Array  # where its id lies in RequestStates.token_ids, seen flat
    positions: Int64Array
    kv_rows: Int64Array  # see ForwardContext


def make_rows(plan: StepPlan) -> StepRows:
    slots, positions, num_tokens, samples = (
        np.array(values, dtype=np.int32)
        for values in (plan.slots, plan.positions, plan.num_tokens, plan.samples)
    )
    sampling = np.flatnonzero(samples)
    return StepRows(
        slots=slots,
        positions=positions,
        num_tokens=num_tokens,
        starts=np.concatenate(([0], np.cumsum(num_tokens, dtype=np.int64))).astype(np.int64),
        sampling=sampling,
        next_positions=(positions + num_tokens)[sampling],
    )


def masks_by_row(
    rows: StepRows, masked_rows: "array[int]", masks: "array[int]"
) -> dict[int, Int32Array]:
    """Returns the masks of a plan by the places of their rows among those that sample."""
    if not len(masked_rows):
        return {}
    words = np.frombuffer(masks, dtype=np.int32).reshape(len(masked_rows), -1)
    places = np.searchsorted(rows.sampling, np.array(masked_rows, dtype=np.int64))
    return dict(zip(places.tolist(), words, strict=True))


def token_inputs(
    rows: StepRows, page_table: Int32Array, *, block_tokens: int, max_tokens: int
) -> TokenInputs:
    """Returns the inputs of every token of the step.

    Args:
        page_table: [slots, pages], RequestStates.page_table.
        max_tokens: ids that RequestStates holds for each slot.
    """
    row_of_token = np.repeat(np.arange(len(rows.slots)), rows.num_tokens)
    offsets = np.arange(rows.starts[-1]) - rows.starts[row_of_token]
    positions = rows.positions[row_of_token] + offsets
    slots = rows.slots[row_of_token].astype(np.int64)
    pages = page_table[slots, positions // block_tokens].astype(np.int64)
    return TokenInputs(
        places=slots * max_tokens + positions,
        positions=positions,
        kv_rows=pages * (2 * block_tokens) + positions % block_tokens,
    )
