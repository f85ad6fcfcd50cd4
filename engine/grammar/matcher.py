"""One sequence's place in its grammar."""

from array import array
from collections.abc import Callable, Collection, Iterable
from functools import partial

from llguidance import LLMatcher

from loraplex.engine.grammar.vocabulary import Vocabulary

Run = Callable[[Callable[[], None]], None]


class GrammarMatcher:
    """Implements Constraint for one sequence.

    A mask allows the tokens with which the text so far can still become one of the grammar, and the
    sequence's stop ids where the text may end. Before `min_tokens` it allows no stop id, unless
    the grammar allows nothing else.

    Attributes:
        mask: see Constraint. Other threads set it.
        on_error: called with the text of an error, after which no mask comes.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        *,
        stop_ids: Collection[int],
        min_tokens: int,
        run: Run,
        on_error: Callable[[str], None],
    ) -> None:
        """`run` has another thread call a function."""
        self.mask: array[int] | None = None
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._stop_ids = vocabulary.known(stop_ids)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._run = run
        self.on_error = on_error

    def advance(self, token_id: int) -> None:
        self.mask = None
        self._run(partial(self._advance, token_id))

    def _advance(self, token_id: int) -> None:
        if self.consume([token_id]):
            self.compute_mask()

    def consume(self, token_ids: Iterable[int]) -> bool:
        """Take tokens without computing a mask. Returns False after an error."""
        for token_id in token_ids:
            self._num_tokens += 1
            if not self._matcher.consume_token(token_id):
                self.on_error(describe_error(self._matcher.get_error()))
                return False
        return True

    def compute_mask(self) -> None:
        """Set `mask` for the tokens so far."""
        allowed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.on_error(describe_error(self._matcher.get_error()))
            return
        bits = self._vocabulary.fit_mask(allowed)
        if self._num_tokens < self._min_tokens:
            without_stops = bits[:]
            for i in self._stop_ids:
                without_stops[i >> 3] &= ~(1 << (i & 7))
            if any(without_stops):
                self._publish(without_stops)
                return
        if self._matcher.is_accepting():
            for i in self._stop_ids:
                bits[i >> 3] |= 1 << (i & 7)
        self._publish(bits)

    def _publish(self, bits: bytearray) -> None:
        self.mask = array("i", bytes(bits))


def describe_error(text: str) -> str:
    """Returns the library's error in one line."""
    lines = (line.strip() for line in text.replace("<non-verbose/>", "").splitlines())
    return " ".join(line for line in lines if line)[:500]
