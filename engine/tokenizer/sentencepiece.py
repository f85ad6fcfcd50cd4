"""Adapts SentencePiece to TokenizerBackend, equal to Hugging Face's slow LlamaTokenizer."""

import re
import struct
from collections.abc import Iterable, Sequence

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from loraplex.engine.errors import ConfigError

# Encodes ModelProto.normalizer_spec.add_dummy_prefix = false. Protobuf merges repeated fields, so
# appending these bytes to a model changes that one setting.
_NO_PREFIX = b"\x1a\x02\x18\x00"


def make_proto(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    special: dict[str, str],
    add_prefix_space: bool,
) -> bytes:
    """Serializes a BPE vocabulary as a ModelProto (sentencepiece_model.proto).

    Args:
        types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
        special: maps `unk_token`, `bos_token` and `eos_token` to pieces.
    """
    out = bytearray()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        entry = _text(1, piece) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        out += _message(1, entry)
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, int(6 in types))
    for name, number in (("unk_token", 45), ("bos_token", 46), ("eos_token", 47)):
        if name in special:
            trainer += _text(number, special[name])
    normalizer = _text(1, "identity") + _number(3, int(add_prefix_space)) + _number(4, 0)
    return bytes(out) + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _pattern(token: AddedToken) -> str:
    """Returns a pattern with one group, the token; around it, what its flags make it swallow."""
    pattern = f"({re.escape(token.content)})"
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")


class SentencePieceBackend:
    """Implements TokenizerBackend with a SentencePiece model.

    Special tokens written in a text split it, and each part is encoded on its own. A `legacy`
    tokenizer puts a space before every part, others only before the first.

    Attributes:
        vocab_size: size of the vocabulary with the added tokens.
        adds_prefix_space: True if a text is encoded as if a space stood before it.
    """

    def __init__(
        self,
        proto: bytes,
        *,
        added: dict[int, AddedToken],
        named: Iterable[AddedToken] = (),
        add_bos: bool,
        add_eos: bool,
        legacy: bool,
    ) -> None:
        """Loads a model.

        Args:
            proto: a serialized ModelProto, the content of a tokenizer.model.
            added: tokens from other files, by id. An id below the vocabulary's size renames a
                piece.
            named: tokens that the files name without an id. One that is no piece gets a new id.

        Raises:
            ConfigError: `proto` is not a SentencePiece model.
        """
        try:
            self._model = SentencePieceProcessor(model_proto=proto)
            self._bare_model = SentencePieceProcessor(model_proto=proto + _NO_PREFIX)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"not a SentencePiece model ({error})") from None
        size = self._model.get_piece_size()
        added = dict(added)
        for token in named:
            token_id = self._model.piece_to_id(token.content)
            is_piece = self._model.id_to_piece(token_id) == token.content
            added[token_id if is_piece else max([size, *(i + 1 for i in added)])] = token
        self.vocab_size = max([size, *(i + 1 for i in added)])
        self._prefix = [self._model.bos_id()] if add_bos and self._model.bos_id() >= 0 else []
        self._suffix = [self._model.eos_id()] if add_eos and self._model.eos_id() >= 0 else []
        self._added = {i: token.content for i, token in added.items()}
        tokens = {i: AddedToken(self._model.id_to_piece(i)) for i in self._control_ids()} | added
        self._special = {token.content: i for i, token in tokens.items()}
        longest_first = sorted(tokens.values(), key=lambda token: len(token.content), reverse=True)
        self._split = re.compile("|".join(map(_pattern, longest_first))) if tokens else None
        self.adds_prefix_space = self._model.encode("a") != self._bare_model.encode("a")
        self._legacy = legacy

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text) if self._split else ():
            self._encode_part(text[at : match.start()], at == 0, ids)
            ids.append(self._special[match.group(match.lastindex or 0)])
            at = match.end()
        self._encode_part(text[at:], at == 0, ids)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def id_to_piece(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id]
        if 0 <= token_id < self._model.get_piece_size():
            return self._model.id_to_piece(token_id)
        return None

    def piece_to_id(self, piece: str) -> int | None:
        if piece in self._special:
            return self._special[piece]
        token_id = self._model.piece_to_id(piece)
        return token_id if self._model.id_to_piece(token_id) == piece else None

    def control_ids(self) -> frozenset[int]:
        """Returns the ids of the model's control tokens and of its unknown token."""
        return frozenset(self._control_ids())

    def control_tokens(self) -> dict[str, str]:
        """Returns the model's own bos_token, eos_token and unk_token."""
        ids = {
            "bos_token": self._model.bos_id(),
            "eos_token": self._model.eos_id(),
            "unk_token": self._model.unk_id(),
        }
        return {name: self._model.id_to_piece(i) for name, i in ids.items() if i >= 0}

    def _control_ids(self) -> list[int]:
        model = self._model
        return [
            i for i in range(model.get_piece_size()) if model.is_control(i) or model.is_unknown(i)
        ]

    def _encode_part(self, text: str, is_first: bool, ids: list[int]) -> None:
        if text:
            model = self._model if is_first or self._legacy else self._bare_model
            ids += model.encode(text)
