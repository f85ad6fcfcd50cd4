"""Loads the tokenizer that an adapter brings, which may add tokens to the base model's."""

from pathlib import Path

from loraplex.engine.errors import ConfigError
from loraplex.engine.tokenizer.loading import ReadFile, load_file, read_file, vocabulary_file
from loraplex.engine.tokenizer.tokenizer import Tokenizer

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def load_adapter_tokenizer(
    folder: Path, base_path: Path, read: ReadFile = read_file
) -> Tokenizer | None:
    """Returns the tokenizer in an adapter's folder, None if there is none or it is the base's file
    for file.

    A folder without a vocabulary may still declare added tokens: they extend the base's vocabulary.

    Args:
        base_path: the base's tokenizer: a folder or a file.
        read: reads the files of the folder; it may raise what it likes.

    Raises:
        ConfigError: there is no such folder, or a file is damaged or cannot be extended.
    """
    if not folder.is_dir():
        raise ConfigError(f"the adapter's folder {folder} is not on this machine")
    own = [name for name in _FILES if (folder / name).is_file()]
    base = base_path if base_path.is_dir() else base_path.parent
    if all(read(folder / name) == read_file(base / name) for name in own):
        return None
    path = vocabulary_file(folder)
    if path is None and "added_tokens.json" in own:
        path = vocabulary_file(base_path) if base_path.is_dir() else base_path
        if path is None or path.suffix == ".gguf":
            raise ConfigError(
                "added_tokens.json needs a tokenizer.json or tokenizer.model beside it, because "
                "the base model has none"
            )
    return load_file(path, folder, read) if path is not None else None


def check_extends(own: Tokenizer, base: Tokenizer, *, num_rows: int, num_base_rows: int) -> bool:
    """Checks that a tokenizer keeps the base's tokens, and has none without a row.

    Args:
        num_rows: tokens of the model with the adapter.
        num_base_rows: tokens of the base model. Tokens of its tokenizer may lie behind them.

    Returns:
        Whether there are added tokens.

    Raises:
        ConfigError: the text names the first difference.
    """
    has_added = False
    for token_id in range(max(own.vocab_size, base.vocab_size)):
        piece, known = own.id_to_token(token_id), base.id_to_token(token_id)
        if known is not None and piece != known:
            raise ConfigError(
                f"its tokenizer does not extend the base model's: token {token_id} is {piece!r} "
                f"there and {known!r} in the base; add tokens behind the last one instead"
            )
        is_added = piece is not None and known is None
        if token_id >= num_rows and (is_added or (known and token_id < num_base_rows)):
            raise ConfigError(
                f"the tokenizer has the token {piece!r} with id {token_id}, but the adapter has "
                f"rows for {num_rows} tokens: save it with its tokenizer and with "
                "save_embedding_layers=True"
            )
        has_added = has_added or is_added
    return has_added
