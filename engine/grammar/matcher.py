"""One sequence's place in its grammar."""

from array import array
from collections.abc import Callable, Collection, Iterable

from llguidance import LLMatcher

from loraplex.engine.grammar.vocabulary import Vocabulary

_NOTHING_FITS = ("NoExtension", "NoExtensionBias")


class GrammarMatcher:
    """Implements Constraint for one sequence.

    A mask allows the tokens with which the text so far can still become one of the grammar, and the
    sequence's stop ids where the text may end. Before `min_tokens` it allows no stop id, unless
    the grammar allows nothing else.

    Attributes:
        mask, draft_masks: see Constraint. Another thread sets them.
        library: the grammar library's object.
        on_error: called with the text of an error, after which no mask comes.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        *,
        stop_ids: Collection[int],
        min_tokens: int,
        on_advance: "Callable[[GrammarMatcher, array[int], array[int]], None]",
        on_error: Callable[[str], None],
    ) -> None:
        """`on_advance` has another thread take tokens and set the masks after them and after each
        of the drafts that it is given besides."""
        self.mask: array[int] | None = None
        self.draft_masks: list[array[int]] = []
        self.library = matcher
        self.vocabulary = vocabulary
        self._stop_ids = vocabulary.known(stop_ids)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._on_advance = on_advance
        self.on_error = on_error

    def advance(self, token_ids: "array[int]", drafts: "array[int]") -> None:
        self.mask = None
        self._on_advance(self, token_ids, drafts)

    def branch(self) -> "GrammarMatcher":
        """Returns a copy that may follow drafts. Its errors are nobody's."""
        copy = GrammarMatcher(
            self.library.deep_copy(),
            self.vocabulary,
            stop_ids=self._stop_ids,
            min_tokens=self._min_tokens,
            on_advance=self._on_advance,
            on_error=lambda text: None,
        )
        copy._num_tokens = self._num_tokens
        return copy

    def consume(self, token_ids: Iterable[int]) -> bool:
        """Take tokens without computing a mask. Returns False after an error."""
        for token_id in token_ids:
            self._num_tokens += 1
            if not self.library.consume_token(token_id):
                self.on_error(describe_error(self.library.get_error()))
                return False
        return True

    def set_masks(self, masks: "list[array[int]]") -> None:
        """Set the mask after the tokens so far, then those after drafts. Nothing after an error."""
        if masks:
            self.draft_masks = masks[1:]
            self.mask = masks[0]  # last: it tells the other thread that both are there

    def make_mask(self, allowed: memoryview) -> "array[int] | None":
        """Returns the mask for the tokens so far from the library's; None after an error."""
        if self.library.is_error():
            self.on_error(describe_error(self.library.get_error()))
            return None
        mask = self.vocabulary.fit_mask(allowed)
        if self._num_tokens < self._min_tokens:
            without_stops = mask[:]
            self._set_stops(without_stops, allowed=False)
            if any(without_stops):
                return without_stops
        if self.library.is_accepting():
            self._set_stops(mask, allowed=True)
        return mask

    def _set_stops(self, mask: "array[int]", *, allowed: bool) -> None:
        bits = memoryview(mask).cast("B")
        for i in self._stop_ids:
            if allowed:
                bits[i >> 3] |= 1 << (i & 7)
            else:
                bits[i >> 3] &= ~(1 << (i & 7))


def allows(mask: "array[int]", token_id: int) -> bool:
    return bool(mask[token_id >> 5] >> (token_id & 31) & 1)


def describe_error(text: str) -> str:
    """Returns the library's error in one line."""
    text = text.replace("<non-verbose/>", "").partition("<state>")[0]
    if text.strip() in _NOTHING_FITS:
        return "no text fits the grammar"
    lines = (line.strip() for line in text.splitlines())
    return " ".join(line for line in lines if line)[:500]
