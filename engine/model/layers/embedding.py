"""Token embedding and output head, whole or split by vocabulary."""

import torch

from loraplex.backends.collective.contract import EMBEDDING, CollectiveOp
from loraplex.engine.model.shard import Piece
from loraplex.engine.model.vocabulary_change import VocabularyChange


class Embedding:
    """Holds one rank's rows of the vocabulary.

    Attributes:
        weight: [vocabulary.size, hidden_size]; rows behind the last token are zero.
    """

    def __init__(
        self,
        vocabulary: Piece,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        collective: CollectiveOp | None = None,
    ) -> None:
        self.weight = torch.empty(vocabulary.size, hidden_size, dtype=dtype, device=device)
        self._vocabulary = vocabulary
        self._collective = collective

    def __call__(
        self, token_ids: torch.Tensor, out: torch.Tensor, change: VocabularyChange | None = None
    ) -> None:
        """Write the embeddings of token ids, int32 or int64 [T], to `out` [T, hidden_size].

        Ids behind the vocabulary are those of `change`.
        """
        if self._collective is None:
            known = token_ids if change is None else token_ids.clamp_max(len(self.weight) - 1)
            torch.index_select(self.weight, 0, known, out=out)
            if change is not None:
                change.embed(token_ids, out)
            return
        partial = self._collective.partial(len(token_ids), EMBEDDING)
        rows = token_ids - self._vocabulary.start
        is_own = (rows >= 0) & (rows < len(self.weight))
        torch.index_select(self.weight, 0, rows.clamp(0, len(self.weight) - 1), out=partial)
        partial.mul_(is_own[:, None])
        if change is not None:
            change.embed(token_ids, partial)
        self._collective.all_reduce(partial, out)

    def logits(
        self,
        hidden: torch.Tensor,
        out: torch.Tensor | None = None,
        change: VocabularyChange | None = None,
    ) -> torch.Tensor:
        """Returns logits [N, vocab_size] of hidden states [N, hidden_size], in the weights' dtype.

        They are written to `out`, if it is given. Every rank gets the same ones. There are more
        columns where `change` adds tokens.
        """
        if self._collective is None:
            logits = torch.mm(hidden, self.weight.t(), out=out)
            if change is not None:
                change.score(hidden, logits)
            return logits if change is None else change.fit(hidden, logits)
        own = torch.mm(hidden, self.weight.t())
        if change is not None:
            change.score(hidden, own)
        logits = self._collective.all_gather(own)[:, : self._vocabulary.total]
        logits = logits.clone() if out is None else out.copy_(logits)
        return logits if change is None else change.fit(hidden, logits)
