"""Collects the tokens that a tokenizer's configuration adds to its vocabulary.

The rules are those of `transformers` 5: which file wins, which flags a token has, and in which
order new tokens get their ids.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken

_STANDARD = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Tokens that the files beside a vocabulary declare."""

    by_id: dict[int, AddedToken] = field(default_factory=dict)
    named: dict[str, AddedToken] = field(default_factory=dict)  # bos_token and so on
    extra: list[AddedToken] = field(default_factory=list)

    @property
    def names(self) -> dict[str, str]:
        """Maps names such as `bos_token` to texts, for chat templates."""
        return {name: token.content for name, token in self.named.items()}

    def in_order(self, known: Iterable[AddedToken] = ()) -> list[AddedToken]:
        """Returns every token once: those with ids by id, then the named, then the extra ones.

        A named token is special.

        Args:
            known: added tokens of the vocabulary's own file. A named or extra token that is among
                them is left out.
        """
        named = set(self.names.values())
        tokens = [self.by_id[i] for i in sorted(self.by_id)]
        seen = {token.content for token in [*known, *tokens]}
        for token in [*self.named.values(), *self.extra]:
            if token.content not in seen:
                seen.add(token.content)
                tokens.append(token)
        return [_as_special(token) if token.content in named else token for token in tokens]


def read_added_tokens(
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added_json: Mapping[str, Any],
    known: Mapping[int, AddedToken],
) -> AddedTokens:
    """Reads the tokens of a folder.

    Args:
        config: tokenizer_config.json. If it has added_tokens_decoder, the other three only fill
            ids that it leaves out or are not read.
        special_map: special_tokens_map.json.
        added_json: added_tokens.json, token to id.
        known: the added tokens of tokenizer.json by id.
    """
    entries = config.get("added_tokens_decoder")
    values = dict(config) if entries is not None else {**config, **special_map}
    extra_values = values.get("extra_special_tokens") or values.get("additional_special_tokens")
    names = [name for name in _STANDARD if name in values]
    names += [name for name in values if name.endswith("_token") and name not in _STANDARD]
    if isinstance(extra_values, dict):  # more names, for tokens of images and the like
        values |= extra_values
        names += [name for name in extra_values if name not in names]
        extra_values = None
    named = {name: token for name in names if (token := _token(values[name])) is not None}
    extra = [token for value in extra_values or [] if (token := _token(value)) is not None]
    special = {token.content for token in [*named.values(), *extra]}
    if entries is not None:
        by_id = {int(i): _declared(entry) for i, entry in entries.items()}
    else:
        by_id = {
            int(i): AddedToken(text, special=text in special, normalized=text not in special)
            for text, i in added_json.items()
        } | dict(known)
    flags = {token.content: token for token in by_id.values()}
    named = {name: flags.get(token.content, token) for name, token in named.items()}
    return AddedTokens(by_id, named, extra)


def _declared(entry: Mapping[str, Any]) -> AddedToken:
    """Returns a token of added_tokens_decoder. Without the flag it is not special."""
    special = bool(entry.get("special", False))
    flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
    return AddedToken(entry["content"], special=special, **{"normalized": not special, **flags})


def _token(value: Any) -> AddedToken | None:
    """Returns the token of a text or of a map with flags. It is special unless the map denies it.

    Other values, such as those of add_bos_token, give None.
    """
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False) if value else None
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    is_denied = value.get("__type") == "AddedToken"  # such a map lists all flags that are set
    return _declared({"special": not is_denied, "normalized": False, **value})


def _as_special(token: AddedToken) -> AddedToken:
    if token.special:
        return token
    flags = {name: getattr(token, name) for name in _FLAGS}
    return AddedToken(token.content, special=True, **flags)
