"""Logits to token ids and log-probabilities, on the device and without a host sync.

The order is vLLM's: logit bias, penalties, stop ids forbidden before min_tokens; greedy rows take
the maximum; the others: temperature, min-p, top-k, top-p, then a draw. Log-probabilities are of
the logits as the model gave them.

A draw is the Gumbel-max trick with noise that is a hash of (seed, position, token id), so it
depends neither on the batch nor on what ran before.
"""

from dataclasses import dataclass

import torch

CHUNK_ELEMS = 1 << 24
"""Rows are drawn in chunks of about so many logits, which bounds the scratch memory."""

_MASK_32 = 0xFFFFFFFF


@dataclass(slots=True)
class SamplingBatch:
    """What the N rows of a step need; None where no row uses it. See SamplingStates.collect."""

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
    random_rows: torch.Tensor | None = None  # int64 [R]; the other rows are greedy
    temperature: torch.Tensor | None = None  # float32 [R]
    keys: torch.Tensor | None = None  # int64 [R, 2], 32 bit each
    min_p: torch.Tensor | None = None  # float32 [R]
    top_k: torch.Tensor | None = None  # int64 [R], the vocabulary's size where off
    top_p: torch.Tensor | None = None  # float32 [R]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of n tokens and the k best of each position; log-probabilities are float32."""

    token_ids: torch.Tensor  # int32 [n, 1 + k], the token itself first
    logprobs: torch.Tensor  # [n, 1 + k]
    ranks: torch.Tensor  # int32 [n], of the token itself; 1 is the most likely


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    token_ids: torch.Tensor,
    num_known_tokens: int,
) -> torch.Tensor:
    """The next token of each row, int64 [N].

    Args:
        logits: float32 [N, vocabulary]; overwritten.
        token_ids: [slots, length], where penalties look up what a request has so far.
        num_known_tokens: an upper bound of batch.num_known_tokens, known on the CPU.
    """
    _adjust(logits, batch, token_ids, num_known_tokens)
    chosen = logits.argmax(dim=-1)
    if batch.random_rows is not None:
        rows_per_chunk = max(1, CHUNK_ELEMS // logits.shape[1])
        for start in range(0, len(batch.random_rows), rows_per_chunk):
            part = slice(start, start + rows_per_chunk)
            chosen.index_copy_(0, batch.random_rows[part], _draw(logits, batch, part))
    return chosen


def score(logits: torch.Tensor, token_ids: torch.Tensor, num_best: int) -> Logprobs:
    """Log-probabilities of given tokens, and of the best ones.

    Args:
        logits: float32 [n, vocabulary], as the model gave them.
        token_ids: int64 [n].
    """
    logprobs = logits.log_softmax(dim=-1)
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
        # No id comes twice in a row's bias, so nothing is added to one element twice.
        where = (batch.bias_rows, batch.bias_ids)
        logits[where] = logits[where] + batch.bias
    if batch.penalty_rows is not None:
        _penalize(logits, batch, token_ids, num_known_tokens)
    if batch.forbidden_rows is not None:
        logits[batch.forbidden_rows, batch.forbidden_ids] = -torch.inf


def _penalize(
    logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor, num_known_tokens: int
) -> None:
    """Repetition over prompt and answer (CTRL, arXiv 1909.05858); the others over the answer."""
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


def _draw(logits: torch.Tensor, batch: SamplingBatch, part: slice) -> torch.Tensor:
    """int64 [rows of the part]."""
    assert batch.random_rows is not None
    assert batch.temperature is not None and batch.keys is not None
    values = logits.index_select(0, batch.random_rows[part])
    values /= batch.temperature[part, None]
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
    return values.add_(gumbel_noise(batch.keys[part], values.shape[1])).argmax(dim=-1)


def _keep_top(
    values: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """The k best of each row (and their equals), then the smallest set of mass p; others -inf."""
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


def gumbel_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """float32 [R, vocab_size], the same for equal keys on every device, up to rounding.

    The hash is two rounds of a 32-bit multiply-xorshift mixer over (token id, key), in int64
    arithmetic whose products stay below 2^63.
    """
    ids = torch.arange(vocab_size, device=keys.device)
    bits = _mix32((ids * 0x61C88647 + keys[:, :1]) & _MASK_32)
    bits = _mix32(bits ^ keys[:, 1:])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # exact in float32, and never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix32(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK_32
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK_32
    return x ^ (x >> 16)
