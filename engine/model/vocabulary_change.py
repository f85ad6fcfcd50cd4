"""Interface of the adapters' changes of the token embedding and the head."""

from typing import Protocol

import torch


class VocabularyChange(Protocol):
    """The changes of the adapters of some rows. Under tensor parallelism each rank makes those of
    its own tokens. An adapter may have tokens behind the base model's, or fewer than it."""

    def embed(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Change the base model's embeddings in place.

        Args:
            token_ids: int32 or int64 [T].
            out: [T, hidden_size]; zeros for tokens of other ranks. The rows of added tokens may
                hold anything if there is one rank, and are zeros otherwise.
        """
        ...

    def score(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Change the base model's logits in place.

        Args:
            hidden: [N, hidden_size].
            logits: [N, tokens of this rank].
        """
        ...

    def fit(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Fit the logits of all ranks to the vocabularies of the adapters, after `score`.

        Every rank computes the same bits, since `hidden` is equal on all of them.

        Args:
            hidden: [N, hidden_size].
            logits: [N, vocabulary]; mutated.

        Returns:
            `logits`, or [N, more columns] if an adapter has added tokens. A row has -inf for each
            token that it may not use.
        """
        ...
