"""Token sequences that an answer must not contain, by request."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.scheduler.worker_protocol import SamplingSpec

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BadWords:
    """The forbidden sequences of one request: S of one token, W longer ones with P prefix tokens.

    A longer sequence forbids its last token where the answer ends with the tokens before it.
    """

    single_ids: Int64Array  # [S]
    last_ids: Int64Array  # [W]
    prefix_words: Int64Array  # [P], the sequence that each prefix token belongs to
    prefix_distances: Int64Array  # [P], how many positions it stands before the last token
    prefix_ids: Int64Array  # [P]

    @classmethod
    def of(cls, spec: SamplingSpec) -> "BadWords | None":
        """Returns the sequences of a request, None if it has none."""
        if not spec.bad_word_lengths:
            return None
        ids = np.array(spec.bad_word_ids, dtype=np.int64)
        words = np.split(ids, np.cumsum(spec.bad_word_lengths)[:-1])
        longer = [word for word in words if len(word) > 1]
        return cls(
            single_ids=np.array([word[0] for word in words if len(word) == 1], dtype=np.int64),
            last_ids=np.array([word[-1] for word in longer], dtype=np.int64),
            prefix_words=np.repeat(np.arange(len(longer)), [len(word) - 1 for word in longer]),
            prefix_distances=_joined([np.arange(len(word) - 1, 0, -1) for word in longer]),
            prefix_ids=_joined([word[:-1] for word in longer]),
        )

    def prefixes(self, slot: int, position: int, num_generated: int, first_word: int) -> Int64Array:
        """Returns what to compare for the token at `position`: see SamplingBatch.word_prefixes.

        A sequence longer than the answer compares with the id -1, which no token has: the prompt
        takes no part.
        """
        is_known = self.prefix_distances <= num_generated
        return np.stack(
            [
                self.prefix_words + first_word,
                np.full(len(self.prefix_ids), slot, dtype=np.int64),
                np.maximum(position - self.prefix_distances, 0),
                np.where(is_known, self.prefix_ids, -1),
            ]
        )


def _joined(parts: list[Int64Array]) -> Int64Array:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def forbid_last_ids(
    logits: torch.Tensor,
    rows: torch.Tensor,
    last_ids: torch.Tensor,
    prefixes: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """Set the logit of a sequence's last id to -inf where the tokens before it are its prefix.

    Args:
        logits: float32 [N, vocabulary]; mutated. A NaN or +inf stays visible, as NaN.
        rows: int64 [W], the row of each sequence.
        last_ids: int64 [W].
        prefixes: int64 [4, P]: sequence, slot, column and id of each prefix token.
        token_ids: int32 [slots, length].
    """
    words, slots, columns, ids = prefixes
    differs = (token_ids[slots, columns] != ids).float()
    num_different = logits.new_zeros(len(last_ids)).index_add_(0, words, differs)
    change = torch.where(num_different == 0, -torch.inf, 0.0)
    logits.index_put_((rows, last_ids), change, accumulate=True)  # a row may have an id twice
