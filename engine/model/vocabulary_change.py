"""Interface of the adapters' changes of the token embedding and the head."""

from typing import Protocol

import torch


class VocabularyChange(Protocol):
    """The changes of the adapters of some rows. Under tensor parallelism each rank makes those of
    its own tokens."""

    def embed(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Change the base model's embeddings in place.

        Args:
            token_ids: int32 or int64 [T].
            out: [T, hidden_size]; zeros for tokens of other ranks.
        """
        ...

    def score(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Change the base model's logits in place.

        Args:
            hidden: [N, hidden_size].
            logits: [N, tokens of this rank].
        """
        ...
