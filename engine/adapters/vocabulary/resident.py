"""The resident adapters that change the token embedding or the head."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.adapters.target import VocabularyTarget
from loraplex.memory.vocabulary_part import VocabularyPart, VocabularyParts


@dataclass(frozen=True, slots=True)
class ResidentPart:
    """A change of the embedding or the head, with its tokens on the device.

    Attributes:
        token_ids: int64 [n], ascending.
        own: int64 [m], which of them this rank holds.
        own_columns: int64 [m], where they lie among this rank's tokens.
        added: int64 [k], which of them the base model lacks.
        added_ids: int64 [k], these tokens.
    """

    part: VocabularyPart
    token_ids: torch.Tensor
    own: torch.Tensor
    own_columns: torch.Tensor
    added: torch.Tensor
    added_ids: torch.Tensor


class ResidentVocabulary:
    """The changes by adapter slot. The thread that plans steps uses it."""

    def __init__(self, sizes: VocabularyTarget, num_rows: int, device: torch.device) -> None:
        """`num_rows` are those of the adapter table."""
        self.sizes = sizes
        self._device = device
        self._is_changed = np.zeros(num_rows, dtype=bool)
        self._embedding: dict[int, ResidentPart] = {}
        self._head: dict[int, ResidentPart] = {}
        self._num_tokens: dict[int, int] = {}  # where it differs from the base's

    def write(self, slot: int, parts: VocabularyParts) -> None:
        """Keep the changes of the adapter in `slot`, in place of those before."""
        self.clear(slot)
        for kept, part in ((self._embedding, parts.embedding), (self._head, parts.head)):
            if part is not None:
                kept[slot] = self._resident(part)
                self._is_changed[slot] = True
        if parts.num_tokens:
            self._num_tokens[slot] = parts.num_tokens
            self._is_changed[slot] = True

    def clear(self, slot: int) -> None:
        """Forget the changes of a slot."""
        self._embedding.pop(slot, None)
        self._head.pop(slot, None)
        self._num_tokens.pop(slot, None)
        self._is_changed[slot] = False

    @property
    def is_empty(self) -> bool:
        """Returns whether no resident adapter has a change."""
        return not (self._embedding or self._head or self._num_tokens)

    def changes(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Returns which of the table's rows hold an adapter with a change."""
        return self._is_changed[slots]

    def embedding(self, slot: int) -> ResidentPart | None:
        return self._embedding.get(slot)

    def head(self, slot: int) -> ResidentPart | None:
        return self._head.get(slot)

    def num_tokens(self, slot: int) -> int:
        """Returns the size of the vocabulary of the adapter in `slot`; -1 is the base model."""
        return self._num_tokens.get(slot, self.sizes.tokens.total)

    def _resident(self, part: VocabularyPart) -> ResidentPart:
        tokens, token_ids = self.sizes.tokens, np.array(part.token_ids, dtype=np.int64)
        own = np.flatnonzero((token_ids >= tokens.start) & (token_ids < tokens.stop))
        added = np.flatnonzero(token_ids >= tokens.total)
        arrays = (token_ids, own, token_ids[own] - tokens.start, added, token_ids[added])
        return ResidentPart(part, *(torch.from_numpy(a).to(self._device) for a in arrays))
