"""The bytes of every token, as the grammar library wants them."""

from array import array
from collections.abc import Iterable
from functools import partial

from llguidance import LLTokenizer, TokenizerWrapper

from loraplex.engine.tokenizer.tokenizer import Tokenizer


class _Tokens:
    """Implements what TokenizerWrapper asks of a tokenizer.

    One token more than the tokenizer has stands for the end of a text. So no token of the model is
    an end for the library, and each request may have ends of its own.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        self.eos_token_id = size
        self.special_token_ids = [*tokenizer.special_ids | set(tokenizer.eos_token_ids), size]
        self.tokens = [*map(tokenizer.token_bytes, range(size)), b"<end>"]
        self._encode = partial(tokenizer.encode, add_special_tokens=False)

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class Vocabulary:
    """A tokenizer's tokens for llguidance.

    Attributes:
        library: the tokenizer object of llguidance.
        num_words: 32-bit words of a mask over the model's vocabulary.
        num_library_bytes: bytes of a mask of the library.
    """

    def __init__(self, tokenizer: Tokenizer, model_vocab_size: int) -> None:
        """`model_vocab_size` counts the logits, which may be more or fewer than the tokens."""
        tokens = _Tokens(tokenizer)
        self.library = LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.eos_token_id)
        self.num_words = -(-model_vocab_size // 32)
        self.num_library_bytes = 4 * -(-len(tokens.tokens) // 32)
        self._num_tokens = min(tokenizer.vocab_size, model_vocab_size)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that the library takes a token for.

        A leading byte 0xFF, which no text has, marks a special token for it.
        """
        return self.library.decode_bytes([token_id])

    def fit_mask(self, mask: bytes | memoryview) -> "array[int]":
        """Returns a mask of the library as one of `num_words` words. Ids past the tokens are 0."""
        num_whole, num_rest = divmod(self._num_tokens, 32)
        fitted = array("i")
        fitted.frombytes(mask[: 4 * num_whole])
        if num_rest:
            word = int.from_bytes(mask[4 * num_whole : 4 * num_whole + 4], "little")
            fitted.append(word & (1 << num_rest) - 1)
        fitted.frombytes(bytes(4 * (self.num_words - len(fitted))))
        return fitted

    def known(self, token_ids: Iterable[int]) -> list[int]:
        """Returns the ids that a mask has bits for."""
        return [i for i in token_ids if 0 <= i < 32 * self.num_words]
