"""The bytes of every token, as the grammar library wants them."""

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
    """

    def __init__(self, tokenizer: Tokenizer, model_vocab_size: int) -> None:
        """`model_vocab_size` counts the logits, which may be more or fewer than the tokens."""
        tokens = _Tokens(tokenizer)
        self.library = LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.eos_token_id)
        self.num_words = -(-model_vocab_size // 32)
        self._num_tokens = min(tokenizer.vocab_size, model_vocab_size)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that the library takes a token for.

        A leading byte 0xFF, which no text has, marks a special token for it.
        """
        return self.library.decode_bytes([token_id])

    def fit_mask(self, mask: bytes) -> bytearray:
        """Returns a mask of the library as one of `num_words` words. Ids past the tokens are 0."""
        fitted = bytearray(4 * self.num_words)
        count = self._num_tokens // 8
        fitted[:count] = mask[:count]
        if self._num_tokens % 8:
            fitted[count] = mask[count] & (1 << self._num_tokens % 8) - 1
        return fitted

    def known(self, token_ids: Iterable[int]) -> list[int]:
        """Returns the ids that a mask has bits for."""
        return [i for i in token_ids if 0 <= i < 32 * self.num_words]
