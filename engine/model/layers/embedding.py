"""Token embedding and output head."""

import torch


class Embedding:
    """Attributes: weight [vocab_size, hidden_size]."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)

    def __call__(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Write the embeddings of token ids, int32 or int64 [T], to `out` [T, hidden_size]."""
        torch.index_select(self.weight, 0, token_ids, out=out)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns logits [N, vocab_size] of hidden states [N, hidden_size], in the weights' dtype.

        They are written to `out`, if it is given.
        """
        return torch.mm(hidden, self.weight.t(), out=out)
