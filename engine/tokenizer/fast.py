"""Adapts the `tokenizers` library to the TokenizerBackend protocol."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

from loraplex.engine.errors import ConfigError

LONG_TEXT = 4096
"""Characters from which encode() makes the batch call, which releases the GIL but costs more."""


class FastBackend:
    """Implements TokenizerBackend with a tokenizer of the `tokenizers` library."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def id_to_piece(self, token_id: int) -> str | None:
        return self._fast.id_to_token(token_id)

    def piece_to_id(self, piece: str) -> int | None:
        return self._fast.token_to_id(piece)


def set_bos_eos(fast: FastTokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `encode` put these tokens around a text, in place of its former post-processor."""
    around = [token for token in (bos, eos) if token and fast.token_to_id(token) is not None]
    single = [bos] if bos in around else []
    single += ["$A", eos] if eos in around else ["$A"]
    fast.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *(f"{part.replace('$A', '$B')}:1" for part in single)],
        special_tokens=[(token, fast.token_to_id(token)) for token in dict.fromkeys(around)],
    )


def decoder_traits(fast: FastTokenizer, path: Path) -> tuple[bool, bool]:
    """Returns (byte_level, strips_leading_space) of the decoder in tokenizer.json.

    Raises:
        ConfigError: the decoder does more than join its tokens' bytes.
    """
    decoder = json.loads(fast.to_str())["decoder"] or {"type": "none"}
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds == ["Metaspace"] and steps[0].get("replacement", "\u2581") == "\u2581":
        return False, steps[0].get("prepend_scheme", "always") != "never"
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        strips = bool(kinds[3:]) and steps[3].get("start", 0) > 0
        if steps[0].get("pattern") == {"String": "\u2581"} and steps[0].get("content") == " ":
            return False, strips
    raise ConfigError(
        f"{path}: decoder {' + '.join(kinds)} is not supported; supported: ByteLevel, Metaspace, "
        "Replace + ByteFallback + Fuse (+ Strip)"
    )
