"""Turns text into token ids, and token ids into text or bytes."""

import codecs
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from loraplex.engine.errors import ClientError

if TYPE_CHECKING:
    from loraplex.engine.tokenizer.chat_template import ChatTemplate

_SPACE = "\u2581"  # SentencePiece writes a space as this character


def _byte_level_alphabet() -> dict[str, int]:
    """Returns GPT-2's map from printable characters to the bytes that they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def byte_level_bytes(piece: str) -> bytes:
    """Returns the bytes of a byte-level BPE piece; one outside the alphabet is plain text."""
    try:
        return bytes(map(_BYTE_LEVEL.__getitem__, piece))
    except KeyError:
        return piece.encode()


def byte_fallback_bytes(piece: str) -> bytes:
    """Returns the bytes of a SentencePiece piece; `<0xE2>` is one byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes.fromhex(piece[3:5])
        except ValueError:
            pass
    return piece.replace(_SPACE, " ").encode()


class TokenizerBackend(Protocol):
    """Encodes text with one tokenizer library."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def id_to_piece(self, token_id: int) -> str | None:
        """Returns the piece of an id, None if the id is not in the vocabulary."""
        ...

    def piece_to_id(self, piece: str) -> int | None: ...


@dataclass(frozen=True, slots=True)
class TokenizerTraits:
    """Properties that a tokenizer's files declare besides the vocabulary."""

    vocab_size: int  # one more than the largest id
    byte_level: bool  # pieces use GPT-2's alphabet; otherwise SentencePiece's
    strips_leading_space: bool  # decoding drops a space at the beginning of a text
    special_ids: frozenset[int] = frozenset()
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    tool_template: str | None = None  # the template for chats with tools, if it is another


class Tokenizer:
    """Encodes text and decodes token ids.

    A decoded text is the joined bytes of its tokens, read as UTF-8. So each token's part of a text
    is known without decoding its neighbours. Incomplete or invalid bytes read as U+FFFD.

    Attributes:
        special_ids: tokens that `skip_special_tokens` leaves out.
        special_tokens: maps names such as `bos_token` to texts, for chat templates.
        eos_token_ids: the ids that the tokenizer's files name; the model's files may name more.
        chat_template: Jinja source, or None.
    """

    def __init__(self, backend: TokenizerBackend, traits: TokenizerTraits) -> None:
        self.vocab_size = traits.vocab_size
        self.special_ids = traits.special_ids
        self.special_tokens = traits.special_tokens
        self.eos_token_ids = traits.eos_token_ids
        self.chat_template = traits.chat_template
        self._tool_template = traits.tool_template
        self.strips_leading_space = traits.strips_leading_space
        bos = traits.special_tokens.get("bos_token")
        self.bos_token_id = backend.piece_to_id(bos) if bos else None
        self._backend = backend
        self._template: ChatTemplate | None = None  # compiled on first use
        self._piece_bytes = byte_level_bytes if traits.byte_level else byte_fallback_bytes
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text. Special tokens written in it become their ids."""
        return self._backend.encode(text, add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of a whole sequence without the ids outside the vocabulary."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join(self.token_bytes(i) for i in token_ids if i not in skipped)
        text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def set_chat_template(self, source: str) -> None:
        """Replaces the templates of the files by one."""
        self.chat_template, self._tool_template, self._template = source, None, None

    def compiled_template(self) -> "ChatTemplate | None":
        """Returns the chat template, None if the model has none. The first call compiles it.

        Raises:
            ConfigError: the template is not valid Jinja.
        """
        if self._template is None and self.chat_template:
            self._template = _compile(self.chat_template, self.special_tokens, self._tool_template)
        return self._template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tokenize: bool = False,
        chat_template: str | None = None,
        **options: Any,
    ) -> str | list[int]:
        """Returns the prompt of a chat, as text or with `tokenize` as token ids.

        The text contains its special tokens, so encode it with add_special_tokens=False.

        Args:
            chat_template: Jinja source that replaces the model's template.
            options: arguments of ChatTemplate.render.

        Raises:
            ClientError: there is no template, or the template refuses the messages.
            ConfigError: `chat_template` is not valid Jinja.
        """
        if chat_template is not None:
            template: ChatTemplate | None = _compile(chat_template, self.special_tokens)
        else:
            template = self.compiled_template()
        if template is None:
            raise ClientError(
                "the model has no chat template: send a plain prompt, or start the engine with "
                "--chat-template FILE"
            )
        text = template.render(messages, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @functools.cached_property
    def max_token_chars(self) -> int:
        """Returns the length of the longest piece: a text of n times as many has over n tokens."""
        pieces = (self._backend.id_to_piece(i) or "" for i in range(self.vocab_size))
        return max(1, max(map(len, pieces), default=1))

    def id_to_token(self, token_id: int) -> str | None:
        """Returns the piece as the vocabulary spells it, None for an unknown id."""
        return self._backend.id_to_piece(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.piece_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token adds to a text, b"" for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._backend.id_to_piece(token_id)
            found = self._bytes[token_id] = b"" if piece is None else self._piece_bytes(piece)
        return found


def _compile(
    source: str, special_tokens: Mapping[str, str], tool_source: str | None = None
) -> "ChatTemplate":
    # Jinja is a third of a frontend's imports, and most processes render no chat.
    from loraplex.engine.tokenizer.chat_template import ChatTemplate

    return ChatTemplate(source, special_tokens, tool_source=tool_source)


def dangling_bytes(raw: bytes) -> bytes:
    """Returns the bytes of an incomplete UTF-8 character at the end of `raw`, or b""."""
    for length in (3, 2, 1):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = raw[-length:]
        if len(tail) == length and decoder.decode(tail) == "":
            return tail
    return b""


def first_known(backend: TokenizerBackend, tokens: Sequence[str | None]) -> tuple[int, ...]:
    """Returns the ids of the tokens that are in the vocabulary, without repetition."""
    found = (backend.piece_to_id(token) for token in tokens if token)
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))
