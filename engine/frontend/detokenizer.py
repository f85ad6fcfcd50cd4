"""Makes text of a sequence's tokens step by step, and finds stop strings in it."""

import codecs
from collections.abc import Iterable, Sequence

from loraplex.engine.tokenizer.tokenizer import Tokenizer, dangling_bytes

_CONTEXT_TOKENS = 8  # last tokens of the prompt; they hold the first bytes of a split character


class IncrementalDetokenizer:
    """Decodes the output of one sequence. It decodes each token once.

    The joined results of `push` and `flush` are the output's part of the text that prompt and
    output decode to together, cut at the stop string. A character that the prompt begins and the
    output completes belongs to the output. The result does not depend on how tokens are grouped.
    A token costs time for its own text and the longest stop string, not for the text so far.

    Attributes:
        stopped: the stop string that was found, or None. No text follows it.
        num_tokens: output tokens pushed, up to the one that completed `stopped`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Ignores stop strings that are complete within the first `min_tokens` tokens."""
        self.stopped: str | None = None
        self.num_tokens = 0
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stops = tuple(string for string in stop if string)
        self._stop_chars = frozenset(char for stop in self._stops for char in stop[:-1])
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._held = ""  # decoded and not returned: a stop string may begin here
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(dangling_bytes(self._join(prompt_token_ids[-_CONTEXT_TOKENS:])))
        self._strip_space = tokenizer.strips_leading_space and not any(
            self._token_bytes(i) for i in prompt_token_ids if i not in self._skipped
        )

    def push(self, token_ids: Iterable[int]) -> str:
        """Adds tokens. Returns the new text that cannot belong to a stop string."""
        if self.stopped is not None:
            return ""
        ready: list[str] = []
        for token_id in token_ids:
            self.num_tokens += 1
            if token_id in self._skipped:
                continue
            text = self._utf8.decode(self._token_bytes(token_id))
            if text:
                ready.append(self._take(text))
                if self.stopped is not None:
                    break
        return "".join(ready)

    def flush(self) -> str:
        """Ends the sequence. Returns the text that was held back."""
        if self.stopped is not None:
            return ""
        text = self._held + self._without_leading_space(self._utf8.decode(b"", True))
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        text = self._without_leading_space(text)
        if not self._stops or not text:
            return text
        num_old = len(self._held)
        text = self._held + text
        if self.num_tokens > self._min_tokens:
            found = self._find_stop(text, num_old)
            if found is not None:
                start, self.stopped = found
                self._held = ""
                return text[: start + len(self.stopped) if self._include_stop else start]
        hold = 0
        if text[-1] in self._stop_chars:
            hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _find_stop(self, text: str, num_old: int) -> tuple[int, str] | None:
        """Returns start and text of the first stop string that ends after `num_old` characters."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old + 1 - len(stop)))
            if start >= 0:
                matches.append((start, stop))
        return min(matches, default=None)

    def _without_leading_space(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text

    def _join(self, token_ids: Sequence[int]) -> bytes:
        return b"".join(self._token_bytes(i) for i in token_ids if i not in self._skipped)


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    last = text[-1:]
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop[length - 1] == last and text.endswith(stop[:length]):
            return length
    return 0
