"""The model of the fake worker: a hash of the history gives the next token and its log-probability.

`oracle()` therefore predicts every output, whatever the batch.
"""

import math
from array import array

from loraplex.scheduler.worker_protocol import SamplingSpec, TokenLogprobs

_MASK = (1 << 64) - 1


def sampling_spec(
    *,
    max_tokens: int = 16,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    num_logprobs: int = -1,
    num_prompt_logprobs: int = -1,
) -> SamplingSpec:
    return SamplingSpec(
        temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, repetition_penalty=1.0,
        presence_penalty=0.0, frequency_penalty=0.0, max_tokens=max_tokens, min_tokens=min_tokens,
        stop_token_ids=array("i", stop_token_ids), num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs, bias_token_ids=array("i"), bias_values=array("f"),
    )  # fmt: skip


def mix(state: int, token_id: int) -> int:
    state = (state * 6364136223846793005 + token_id + 1442695040888963407) & _MASK
    return state ^ (state >> 29)


Weights = list[tuple[int, str]]
"""Adapters of a request: (first position, content, then " * weight" unless that is 1), in order."""


def extend(state: int, token_id: int, position: int, weights: Weights) -> int:
    """Returns the history with the token at `position`, which the weights compute."""
    for first, content in weights:
        if first == position:
            for byte in content.encode():
                state = mix(state, byte)
    return mix(state, token_id)


def last_place(prompt: list[int], sought: tuple[int, ...]) -> int:
    """Returns where `sought` begins last in the prompt; a large number if it does not occur."""
    places = (at for at in range(len(prompt)) if tuple(prompt[at : at + len(sought)]) == sought)
    return max(places, default=1 << 20) if sought else 0


def next_token(state: int, vocab_size: int, banned: frozenset[int]) -> int:
    token_id = (state >> 11) % vocab_size
    while token_id in banned:
        token_id = (token_id + 1) % vocab_size
    return token_id


def oracle(
    prompt: list[int],
    content: str | Weights,
    sampling: SamplingSpec,
    max_model_len: int,
    vocab_size: int,
) -> tuple[list[int], str, int]:
    """Returns tokens, finish reason and stop token of a request served alone, token by token.

    A `content` that is text applies to all tokens.
    """
    weights = [(0, content)] if isinstance(content, str) else content
    state = 0
    for position, token_id in enumerate(prompt):
        state = extend(state, token_id, position, weights)
    stop_ids = frozenset(sampling.stop_token_ids)
    tokens: list[int] = []
    while True:
        banned = stop_ids if len(tokens) < sampling.min_tokens else frozenset()
        token_id = next_token(state, vocab_size, banned)
        state = extend(state, token_id, len(prompt) + len(tokens), weights)
        tokens.append(token_id)
        if token_id in stop_ids:
            return tokens, "stop", token_id
        if len(tokens) == sampling.max_tokens or len(prompt) + len(tokens) == max_model_len:
            return tokens, "length", -1


def fake_logprobs(token_id: int, state: int, is_broken: bool = False) -> TokenLogprobs:
    """The rank carries a fingerprint of the history, so that tests can tell positions apart."""
    value = math.nan if is_broken else -1.0
    return TokenLogprobs(array("i", [token_id]), array("f", [value]), array("i", [state % 9973]))
