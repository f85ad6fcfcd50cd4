"""Reads the options of PEFT that concern the token embedding and the head."""

from typing import Any

MAX_LISTED_TOKENS = 1 << 20
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

_NAMES = {"embed_tokens": EMBEDDING, "lm_head": HEAD}


class VocabularyOptionError(ValueError):
    """An option is malformed or not supported; the text names it."""


def read_token_indices(value: object) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns the retrained tokens by the module that holds their rows, in the order of the file.

    Args:
        value: of trainable_token_indices: a list, which is the embedding's, or a map from names.

    Raises:
        VocabularyOptionError: it is neither, or names another module.
    """
    if not value:
        return ()
    named = value if isinstance(value, dict) else {"embed_tokens": value}
    found = {
        _full_name("trainable_token_indices", name): _token_ids(ids) for name, ids in named.items()
    }
    return tuple(sorted(found.items()))


def read_saved_modules(value: object) -> tuple[str, ...]:
    """Returns the modules of modules_to_save. Raises VocabularyOptionError if one is another than
    the embedding or the head."""
    if not value:
        return ()
    if not isinstance(value, list):
        raise VocabularyOptionError(f"modules_to_save must be a list of names, got {value!r:.80}")
    return tuple(sorted({_full_name("modules_to_save", name) for name in value}))


def _full_name(option: str, name: Any) -> str:
    full = _NAMES.get(name.rpartition(".")[2]) if isinstance(name, str) else None
    if full is None:
        raise VocabularyOptionError(
            f"{option} names {name!r:.80}: it replaces whole modules of the base model; only rows "
            "of embed_tokens and lm_head may be replaced, so train the others with LoRA"
        )
    return full


def _token_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else []
    are_ids = all(type(token) is int and 0 <= token < 1 << 31 for token in ids)
    if not (are_ids and 1 <= len(ids) <= MAX_LISTED_TOKENS):
        raise VocabularyOptionError(
            f"trainable_token_indices must be lists of token ids, got {value!r:.80}"
        )
    if len(set(ids)) < len(ids):
        raise VocabularyOptionError("trainable_token_indices name a token twice")
    return tuple(ids)
