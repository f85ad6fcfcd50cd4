"""Turns words that an answer must not contain into token ids."""

from collections.abc import Iterable

from loraplex.engine.errors import ClientError
from loraplex.engine.tokenizer.tokenizer import Tokenizer


def encode_bad_words(tokenizer: Tokenizer, words: Iterable[str]) -> list[list[int]]:
    """Returns the token sequences that spell the words, at the start of a text and within it.

    A word without leading space may spell differently after a space. The spelling after a space is
    left out where it ends with the other one, which forbids it too.

    Raises:
        ClientError: a word has no tokens.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        text = word.lstrip()
        alone = tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
        if not alone:
            raise ClientError(f"bad_words: {word[:40]!r} has no tokens: leave it out")
        after_space = tuple(tokenizer.encode(" " + text, add_special_tokens=False))
        sequences[alone] = None
        if after_space[-len(alone) :] != alone:
            sequences[after_space] = None
    return [list(sequence) for sequence in sequences]
