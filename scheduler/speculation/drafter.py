"""Drafts the next tokens of one request from its own text.

Prompt lookup (A. Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding): the tokens that
followed the last n-gram before are likely to follow it again.
"""

import math
from array import array
from collections.abc import Collection

from loraplex.scheduler.speculation.ngram_index import NOT_FOUND, NgramIndex
from loraplex.scheduler.speculation.speculation_config import SpeculationConfig

MAX_INDEXED = 1024
"""Tokens that one call indexes, some 0.5 ms. Until a long prompt is indexed, nothing is drafted."""

FIRST_RATE, RATE_STEP = 0.5, 0.2
MIN_RATE = 0.55
"""Share of right guesses from which on drafts pay: a row that verifies them waits for its last
result, which costs up to one step, and with this rate brings one token more or better."""

MIN_CHANCE = 0.2
"""Chance of being right that the last token of a draft must have."""

MAX_SHIFT = 3
"""Tokens that an edit may have added or left out for the place in the source to be found again."""

MAX_MISSES = 6
"""Wrong guesses in a row after which the source is given up until an n-gram is found."""


class Drafter:
    """Follows one text and guesses each next token, also where nothing is drafted.

    A guess costs nothing to check once the token is known. So the rate of right guesses is known
    before anything is drafted and after drafts have stopped, and it decides on their length.
    """

    def __init__(
        self, config: SpeculationConfig, *, num_prompt_tokens: int, stop_ids: Collection[int]
    ) -> None:
        self._index = NgramIndex(config.shortest, config.longest)
        self._max_drafts = config.num_speculative_tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_ids = stop_ids
        self._num_indexed = 0
        self._source = NOT_FOUND  # place of the token that is the guess of the next one
        self._num_misses = 0  # wrong guesses in a row
        self._rate = FIRST_RATE  # moving average over guesses: 1 for a right one, 0 for a wrong one

    def draft(self, token_ids: "array[int]") -> "array[int]":
        """Take in the tokens that are new since the last call.

        Args:
            token_ids: int32, the whole text, prompt first. It only grows.

        Returns:
            The tokens that may follow: none where drafts would not pay. No stop id is among them.
        """
        if not self._follow(token_ids) or self._rate < MIN_RATE:
            return array("i")
        return self._copy(token_ids)

    def _follow(self, token_ids: "array[int]") -> bool:
        """Check the guesses of the new tokens. Returns whether there is a guess of the next one."""
        start = self._num_indexed
        end = self._num_indexed = min(len(token_ids), start + MAX_INDEXED)
        for place in range(start, end):
            found = self._index.add(token_ids, place + 1)
            if self._source != NOT_FOUND and place >= self._num_prompt_tokens:
                is_right = token_ids[self._source] == token_ids[place]
                self._rate += RATE_STEP * (is_right - self._rate)
                self._num_misses = 0 if is_right else self._num_misses + 1
                if is_right:
                    self._source += 1
                elif found != NOT_FOUND:
                    self._source = found
                elif self._num_misses > MAX_MISSES:
                    self._source = NOT_FOUND
                else:
                    self._source = _past_edit(token_ids, self._source, place)
            else:
                self._source, self._num_misses = found, 0
        return end == len(token_ids) and self._source != NOT_FOUND

    def _copy(self, token_ids: "array[int]") -> "array[int]":
        """Returns the tokens from the source on. Past the end, the copy goes on with itself."""
        length = self._max_drafts
        if self._rate < 1:
            length = min(length, int(math.log(MIN_CHANCE) / math.log(self._rate)))
        drafts = token_ids[self._source : self._source + length]
        period = drafts[:]
        while len(drafts) < length:
            drafts += period[: length - len(drafts)]
        for place, token_id in enumerate(drafts):
            if token_id in self._stop_ids:
                return drafts[:place]
        return drafts


def _past_edit(token_ids: "array[int]", source: int, place: int) -> int:
    """Returns where the source goes on if the text at `place` differs from it by an edit.

    That is after the token of `place` if it is near: the edit left tokens out or added some.
    Otherwise one token stands for another, and the next ones agree.
    """
    token_id = token_ids[place]
    for shift in range(1, MAX_SHIFT + 1):
        if source + shift < place and token_ids[source + shift] == token_id:
            return source + shift + 1
        if source >= shift and token_ids[source - shift] == token_id:
            return source - shift + 1
    return source + 1
