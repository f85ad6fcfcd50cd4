"""Turns logits into token ids and log-probabilities, on the device and without a host sync.

The order is logit bias, penalties, stop ids forbidden before min_tokens, bad words, masks. Then
greedy rows take the maximum. Other rows apply temperature, min-p, top-k and top-p and draw.
Log-probabilities are of the logits as the model gave them.

A draw is the Gumbel-max trick. Its noise is a hash of (seed, position, token id), so it depends
neither on the batch nor on earlier steps. The op ``fused`` draws for all rows.

A row with a NaN or +inf, or with -inf alone, gets the id NOT_FINITE (scheduler/worker_protocol.py).
A single -inf is legal: masks use it, and its token is never drawn.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from loraplex.backends.fused.contract import FusedOps
from loraplex.backends.fused.masks import apply_masks
from loraplex.engine.worker.bad_words import forbid_last_ids

CHUNK_ELEMS = 1 << 24
"""Logits that are adjusted in one chunk, about; bounds the scratch memory."""


@dataclass(slots=True)
class SamplingBatch:
    """Parameters of the N rows that sample; None if no row uses one. See SamplingStates.collect."""

    temperature: torch.Tensor  # float32 [N]; 0: greedy
    keys: torch.Tensor  # int64 [N, 2], 32 bits each
    bias_rows: torch.Tensor | None = None  # int64 [number of biases]
    bias_ids: torch.Tensor | None = None  # int64, token ids
    bias: torch.Tensor | None = None  # float32
    penalty_rows: torch.Tensor | None = None  # int64 [P]
    penalty_slots: torch.Tensor | None = None  # int64 [P]
    penalties: torch.Tensor | None = None  # float32 [P, repetition | presence | frequency]
    num_prompt_tokens: torch.Tensor | None = None  # int64 [P]
    num_known_tokens: torch.Tensor | None = None  # int64 [P]
    forbidden_rows: torch.Tensor | None = None  # int64 [number of forbidden ids]
    forbidden_ids: torch.Tensor | None = None  # int64
    word_rows: torch.Tensor | None = None  # int64 [W], of the bad words of several tokens
    word_ids: torch.Tensor | None = None  # int64 [W], their last tokens
    word_prefixes: torch.Tensor | None = None  # int64 [4, tokens before], see forbid_last_ids
    mask_places: torch.Tensor | None = None  # int32 [N], see FusedOps.draw
    masks: torch.Tensor | None = None  # int32 [M, words], see StepPlan.masks; none left out is 0
    cut_rows: torch.Tensor | None = None  # int64 [R], random rows with any of the next three
    min_p: torch.Tensor | None = None  # float32 [R]
    top_k: torch.Tensor | None = None  # int64 [R], the vocabulary's size where off
    top_p: torch.Tensor | None = None  # float32 [R]

    @property
    def is_plain(self) -> bool:
        """Whether the logits are drawn from as they are, with masks or without."""
        rows = (self.bias_rows, self.penalty_rows, self.forbidden_rows, self.word_rows)
        return self.cut_rows is None and all(index is None for index in rows)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Scores of n tokens and of the k best at each position."""

    token_ids: torch.Tensor  # int32 [n, 1 + k], the token itself first
    logprobs: torch.Tensor  # float32 [n, 1 + k]
    ranks: torch.Tensor  # int32 [n], of the token itself; 1 is the most likely


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    token_ids: torch.Tensor,
    num_known_tokens: int,
    *,
    fused: FusedOps,
) -> torch.Tensor:
    """Returns the next token of each row, int32 [N]; NOT_FINITE where there can be none.

    Args:
        logits: [N, vocabulary], the model's dtype.
        token_ids: int32 [slots, length], from which penalties and bad words read a
            request's tokens so far.
        num_known_tokens: an upper bound of batch.num_known_tokens, known on the CPU.
    """
    if batch.masks is not None:
        num_missing = -(-logits.shape[1] // 32) - batch.masks.shape[1]
        if num_missing > 0:
            batch.masks = functional.pad(batch.masks, (0, num_missing))
    if not batch.is_plain:
        logits = logits.to(torch.float32, copy=True)
        _adjust(logits, batch, token_ids, num_known_tokens)
    return fused.draw(
        logits, batch.temperature, batch.keys, mask_places=batch.mask_places, masks=batch.masks
    )


def score(logits: torch.Tensor, token_ids: torch.Tensor, num_best: int) -> Logprobs:
    """Returns the log-probabilities of given tokens and of the best ones.

    Args:
        logits: [n, vocabulary], the model's dtype, as it gave them.
        token_ids: int32 or int64 [n], of the vocabulary.

    Returns:
        NaN for each logprob of a row whose logits are not finite.
    """
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    token_ids = token_ids.long()
    own = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > own).sum(dim=1, dtype=torch.int32) + 1
    best, best_ids = logprobs.topk(min(num_best, logits.shape[1]), dim=1)
    return Logprobs(
        token_ids=torch.cat((token_ids[:, None], best_ids), dim=1).int(),
        logprobs=torch.cat((own, best), dim=1),
        ranks=ranks,
    )


def _adjust(
    logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor, num_known_tokens: int
) -> None:
    if batch.bias_rows is not None and batch.bias is not None:
        # An id occurs once in a row's bias, so no element is added to twice.
        where = (batch.bias_rows, batch.bias_ids)
        logits[where] = logits[where] + batch.bias
    if batch.penalty_rows is not None:
        _penalize(logits, batch, token_ids, num_known_tokens)
    if batch.forbidden_rows is not None:
        forbidden = (batch.forbidden_rows, batch.forbidden_ids)
        logits[forbidden] = logits[forbidden] - torch.inf  # a NaN or +inf stays visible, as NaN
    if batch.word_rows is not None:
        assert batch.word_ids is not None and batch.word_prefixes is not None
        forbid_last_ids(logits, batch.word_rows, batch.word_ids, batch.word_prefixes, token_ids)
    if batch.cut_rows is not None:
        rows_per_chunk = max(1, CHUNK_ELEMS // logits.shape[1])
        for start in range(0, len(batch.cut_rows), rows_per_chunk):
            _cut(logits, batch, slice(start, start + rows_per_chunk))


def _penalize(
    logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor, num_known_tokens: int
) -> None:
    """Apply the repetition penalty (CTRL, arXiv 1909.05858) over prompt and answer, and the other
    penalties over the answer."""
    assert batch.penalty_rows is not None and batch.penalty_slots is not None
    assert batch.num_known_tokens is not None and batch.num_prompt_tokens is not None
    assert batch.penalties is not None
    rows_per_chunk = max(1, CHUNK_ELEMS // logits.shape[1])
    column = torch.arange(num_known_tokens, device=logits.device)
    for start in range(0, len(batch.penalty_rows), rows_per_chunk):
        part = slice(start, start + rows_per_chunk)
        rows = batch.penalty_rows[part]
        ids = token_ids[:, :num_known_tokens].index_select(0, batch.penalty_slots[part]).long()
        known = column < batch.num_known_tokens[part, None]
        generated = known & (column >= batch.num_prompt_tokens[part, None])
        values = logits.index_select(0, rows)
        seen = torch.zeros_like(values).scatter_add_(1, ids, known.float()) > 0
        counts = torch.zeros_like(values).scatter_add_(1, ids, generated.float())
        repetition, presence, frequency = batch.penalties[part, :, None].unbind(1)
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(seen, repeated, values)
        values = values - frequency * counts - presence * (counts > 0)
        logits.index_copy_(0, rows, values)


def _cut(logits: torch.Tensor, batch: SamplingBatch, part: slice) -> None:
    """Set logits that min-p, top-k and top-p exclude to -inf. The others do not change."""
    assert batch.cut_rows is not None
    rows = batch.cut_rows[part]
    kept = logits.index_select(0, rows)
    if batch.mask_places is not None and batch.masks is not None:
        kept = apply_masks(kept, batch.mask_places.index_select(0, rows), batch.masks)
    values = kept / batch.temperature.index_select(0, rows)[:, None]
    if batch.min_p is not None:
        probs = values.softmax(dim=-1)
        floor = batch.min_p[part, None] * probs.amax(dim=-1, keepdim=True)
        values.masked_fill_(probs < floor, -torch.inf)
    if batch.top_k is not None or batch.top_p is not None:
        values = _keep_top(
            values,
            None if batch.top_k is None else batch.top_k[part],
            None if batch.top_p is None else batch.top_p[part],
        )
    logits.index_copy_(0, rows, kept.masked_fill_(values == -torch.inf, -torch.inf))


def _keep_top(
    values: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """Keep the k best of each row and their equals, then the smallest set of mass p. Set the others
    to -inf."""
    ordered, order = values.sort(dim=-1)
    if top_k is not None:
        kth = ordered.gather(1, (values.shape[1] - top_k)[:, None])
        ordered.masked_fill_(ordered < kth, -torch.inf)
    if top_p is not None:
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)
        outside = mass <= 1 - top_p[:, None]
        outside[:, -1] = False
        ordered.masked_fill_(outside, -torch.inf)
    return torch.empty_like(values).scatter_(1, order, ordered)
