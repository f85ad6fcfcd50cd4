"""A tokenizer, whatever file it came from: text to ids, ids to text, ids to bytes."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loraplex.engine.errors import ClientError
from loraplex.engine.tokenizer.chat_template import ChatTemplate

_SPACE = "\u2581"  # SentencePiece's stand-in for a space


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def byte_level_bytes(piece: str) -> bytes:
    """A piece of byte-level BPE; one outside the alphabet stands for itself."""
    try:
        return bytes(map(_BYTE_LEVEL.__getitem__, piece))
    except KeyError:
        return piece.encode()


def byte_fallback_bytes(piece: str) -> bytes:
    """A piece of a SentencePiece vocabulary; `<0xE2>` is one byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes.fromhex(piece[3:5])
        except ValueError:
            pass
    return piece.replace(_SPACE, " ").encode()


class TokenizerBackend(Protocol):
    """What turns text into ids."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def id_to_piece(self, token_id: int) -> str | None:
        """None for an id that is not in the vocabulary."""
        ...

    def piece_to_id(self, piece: str) -> int | None: ...


@dataclass(frozen=True, slots=True)
class TokenizerTraits:
    """What a tokenizer's files say besides the vocabulary."""

    vocab_size: int  # one more than the largest id
    byte_level: bool  # GPT-2's alphabet; otherwise SentencePiece's pieces
    strips_leading_space: bool  # of a whole text, when decoding
    special_ids: frozenset[int] = frozenset()
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None


class Tokenizer:
    """Decoding is defined by bytes: a text is its tokens' bytes, joined, then read as UTF-8.

    So any token's share of a text is known at once, without decoding its neighbours again.
    Incomplete or invalid bytes read as U+FFFD.

    Attributes:
        special_ids: tokens that `skip_special_tokens` leaves out.
        special_tokens: the named ones, `bos_token` and the like, as chat templates want them.
        eos_token_ids: those that the tokenizer's files name; the model's may name more.
        chat_template: Jinja source, or None.
    """

    def __init__(self, backend: TokenizerBackend, traits: TokenizerTraits) -> None:
        self.vocab_size = traits.vocab_size
        self.special_ids = traits.special_ids
        self.special_tokens = traits.special_tokens
        self.eos_token_ids = traits.eos_token_ids
        self.chat_template = traits.chat_template
        self.strips_leading_space = traits.strips_leading_space
        bos = traits.special_tokens.get("bos_token")
        self.bos_token_id = backend.piece_to_id(bos) if bos else None
        self._backend = backend
        self._template: ChatTemplate | None = None  # compiled when first used
        self._piece_bytes = byte_level_bytes if traits.byte_level else byte_fallback_bytes
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written out in `text` become their ids."""
        return self._backend.encode(text, add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids outside the vocabulary are left out."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join(self.token_bytes(i) for i in token_ids if i not in skipped)
        text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt of a chat, see ChatTemplate.render; it holds its special tokens already, so
        encode it with add_special_tokens=False.

        Raises:
            ClientError: there is no template, or the messages do not fit it.
        """
        if not self.chat_template:
            raise ClientError(
                "the model has no chat template: send a plain prompt, or start the engine with "
                "--chat-template FILE"
            )
        template = self._template
        if template is None:
            template = self._template = ChatTemplate(self.chat_template, self.special_tokens)
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    def id_to_token(self, token_id: int) -> str | None:
        """The piece as the vocabulary spells it."""
        return self._backend.id_to_piece(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.piece_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; b"" for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._backend.id_to_piece(token_id)
            found = self._bytes[token_id] = b"" if piece is None else self._piece_bytes(piece)
        return found


def dangling_bytes(raw: bytes) -> bytes:
    """The first bytes of a UTF-8 character that `raw` ends in the middle of, or b""."""
    for length in (3, 2, 1):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = raw[-length:]
        if len(tail) == length and decoder.decode(tail) == "":
            return tail
    return b""


def first_known(backend: TokenizerBackend, tokens: Sequence[str | None]) -> tuple[int, ...]:
    """Ids of those tokens that the vocabulary has, without repetition."""
    found = (backend.piece_to_id(token) for token in tokens if token)
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))
