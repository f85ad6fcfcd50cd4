"""Turns the protocol's log-probabilities into the shapes of OpenAI and vLLM.

A position is a list of `[token id, logprob, rank, text]`: the sampled token, then the best ones.
"""

from typing import Any

from loraplex.engine.frontend.inputs import TextCodec

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write; the value is vLLM's."""

Position = list[list[Any]]


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def chat_logprobs(
    positions: list[Position], num_top: int, codec: TextCodec | None
) -> dict[str, Any]:
    """Returns `logprobs` of a chat's choice, with the `num_top` most likely tokens each."""
    return {
        "content": [
            {
                **_chat_token(position[0], codec),
                "top_logprobs": [_chat_token(entry, codec) for entry in position[1 : 1 + num_top]],
            }
            for position in positions
        ]
    }


def _chat_token(entry: list[Any], codec: TextCodec | None) -> dict[str, Any]:
    token_id, logprob, _, text = entry
    raw = (codec and codec.tokenizer.token_bytes(token_id)) or text.encode()  # an adapter's token
    return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


class CompletionLogprobs:
    """Makes `logprobs` of one choice of a completion, in parts; offsets go on from part to part."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._offset = 0

    def part(self, positions: list[Position | None], first_text: str = "") -> dict[str, Any]:
        """Returns the part for `positions`.

        None is the first token of a prompt, which has no logprob; `first_text` is its text.
        """
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for position in positions:
            text = first_text if position is None else position[0][3]
            tokens.append(text)
            logprobs.append(None if position is None else finite(position[0][1]))
            tops.append(None if position is None else self._top(position))
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, position: Position) -> dict[str, float]:
        """Returns the best tokens by text, and the sampled one besides."""
        entries = [*position[1 : 1 + self._num_top], position[0]]
        return {text: finite(logprob) for _, logprob, _, text in entries}


def prompt_logprobs(positions: list[Position | None]) -> list[dict[str, Any] | None]:
    """Returns vLLM's `prompt_logprobs`: for each token of the prompt a map by token id."""
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": text}
            for token_id, logprob, rank, text in position
        }
        for position in positions
    ]
