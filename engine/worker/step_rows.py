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
    """B rows of T tokens, after N of which the next token is sampled."""

    slots: Int32Array  # [B]
    positions: Int32Array  # [B], of the first token
    num_tokens: Int32Array  # [B]
    starts: Int64Array  # [B + 1], of each row's tokens
    sampling: Int64Array  # [N], the row of each sampled token
    sampled_after: Int64Array  # [N], which of the T tokens it follows
    next_positions: Int32Array  # [N], where it will stand

    @property
    def is_decode(self) -> bool:
        """Whether a token is sampled after each of the T: every row decodes, or verifies drafts."""
        return bool(len(self.sampling) == self.starts[-1])

    @property
    def num_reread(self) -> int:
        """Returns the tokens of context that attention reads again if each of the T tokens is a
        sequence of its own."""
        return int(np.dot(self.num_tokens - 1, self.kv_lens.astype(np.int64)))

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
    starts = np.concatenate(([0], np.cumsum(num_tokens, dtype=np.int64))).astype(np.int64)
    sampling = np.repeat(np.arange(len(samples)), samples)
    # 0 for the last token of a row, 1 for the one before it
    to_end = np.cumsum(samples)[sampling] - 1 - np.arange(len(sampling))
    return StepRows(
        slots=slots,
        positions=positions,
        num_tokens=num_tokens,
        starts=starts,
        sampling=sampling,
        sampled_after=starts[sampling + 1] - 1 - to_end,
        next_positions=((positions + num_tokens)[sampling] - to_end).astype(np.int32),
    )


def draft_places(plan: StepPlan, max_tokens: int) -> Int64Array:
    """Returns where `plan.draft_ids` lie in RequestStates.token_ids, seen flat.

    Args:
        max_tokens: ids that RequestStates holds for each slot.
    """
    rows = make_rows(plan)
    is_draft = np.append(rows.sampling[1:] == rows.sampling[:-1], False)  # one more follows
    row, positions = rows.sampling[is_draft], rows.next_positions[is_draft]
    return rows.slots[row].astype(np.int64) * max_tokens + positions


def masks_by_row(
    rows: StepRows, masked_rows: "array[int]", masks: "array[int]"
) -> dict[int, Int32Array]:
    """Returns the masks of a plan by the places of their tokens among those that are sampled."""
    if not len(masked_rows):
        return {}
    places = np.flatnonzero(np.isin(rows.sampling, np.array(masked_rows, dtype=np.int64)))
    words = np.frombuffer(masks, dtype=np.int32).reshape(len(places), -1)
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
