"""Loads the tokenizer of a model from tokenizer.json, a SentencePiece model or a GGUF file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from loraplex.engine.errors import ConfigError
from loraplex.engine.tokenizer.added_tokens import AddedTokens, read_added_tokens
from loraplex.engine.tokenizer.fast import FastBackend, decoder_traits
from loraplex.engine.tokenizer.sentencepiece import SentencePieceBackend
from loraplex.engine.tokenizer.tokenizer import Tokenizer, TokenizerTraits, first_known


@dataclass(frozen=True, slots=True)
class TextSettings:
    """Settings beside a vocabulary that change prompts or where answers end."""

    chat_template: str | None = None
    eos_token: str | None = None


ReadFile = Callable[[Path], bytes | None]
"""Returns what a file holds, None if there is no such file."""


def read_file(path: Path) -> bytes | None:
    """Reads a whole file; None if it is none."""
    return path.read_bytes() if path.is_file() else None


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a tokenizer; `declare` takes the added tokens that its vocabulary file has."""

    path: Path
    content: bytes
    config: dict[str, Any]
    templates: dict[str, str]
    declare: Callable[[dict[int, AddedToken]], AddedTokens]


def read_text_settings(
    path: Path, chat_template: str = "", read: ReadFile = read_file
) -> TextSettings:
    """Reads the settings in a folder, or beside a tokenizer's file, without the vocabulary.

    Args:
        chat_template: as for load_tokenizer.
        read: reads the files of a folder; it may raise what it likes.

    Raises:
        ConfigError: a file is damaged.
    """
    own = _own_template(chat_template) if chat_template else None
    if path.suffix == ".gguf":
        tokenizer = _load_gguf(path)
        eos = tokenizer.special_tokens.get("eos_token")
        return TextSettings(own or tokenizer.chat_template, eos)
    folder = path if path.is_dir() else path.parent
    config = _read_json(folder / "tokenizer_config.json", read)
    declared = _declared_tokens(folder, config, {}, read)
    template = own or _main_templates(folder, config, read).get("default")
    return TextSettings(template, declared.names.get("eos_token"))


def load_tokenizer(model_path: Path, tokenizer: str = "", chat_template: str = "") -> Tokenizer:
    """Returns the tokenizer of `model_path`, or the one that `tokenizer` names.

    Args:
        model_path: a Hugging Face directory or a GGUF file.
        tokenizer: another directory, or a tokenizer.json, tokenizer.model or .gguf file.
        chat_template: a Jinja file, or Jinja source, that replaces the chat template of the files.

    Raises:
        ConfigError: there is no tokenizer, it is damaged, or its kind is not supported.
    """
    loaded = _load(model_path, tokenizer)
    if chat_template:
        loaded.set_chat_template(_own_template(chat_template))
    return loaded


def _load_gguf(path: Path) -> Tokenizer:
    # A fifth of a frontend's imports, for which clients wait when it is started again.
    from loraplex.engine.checkpoint.gguf_file import GGUFFile
    from loraplex.engine.tokenizer.gguf import tokenizer_from_gguf

    return tokenizer_from_gguf(GGUFFile(path))


def _load(model_path: Path, tokenizer: str) -> Tokenizer:
    path = Path(tokenizer).expanduser() if tokenizer else model_path
    if path.suffix == ".gguf":
        return _load_gguf(path)
    if path.is_dir():
        if found := vocabulary_file(path):
            return load_file(found, path)
        raise ConfigError(
            f"{path} has neither tokenizer.json nor tokenizer.model: name a tokenizer with "
            "--tokenizer, or serve token ids alone with --skip-tokenizer-init"
        )
    if not path.is_file():
        raise ConfigError(f"tokenizer {path} does not exist (nothing is downloaded)")
    return load_file(path, path.parent)


def vocabulary_file(folder: Path) -> Path | None:
    """Returns the file in a folder that holds a vocabulary, None if there is none."""
    paths = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((path for path in paths if path.is_file()), None)


def load_file(path: Path, folder: Path, read: ReadFile = read_file) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json or tokenizer.model.

    Args:
        folder: holds the files that declare special and added tokens, and the chat template.
        read: reads them; it may raise what it likes.

    Raises:
        ConfigError: a file is damaged, or its kind is not supported.
    """
    content = read(path)
    if content is None:
        raise ConfigError(f"{path} is no file")
    config = _read_json(folder / "tokenizer_config.json", read)
    declare = partial(_declared_tokens, folder, config, read=read)
    files = _Files(path, content, config, _chat_templates(folder, config, read), declare)
    return _sentencepiece(files) if path.suffix == ".model" else _fast(files)


def _fast(files: _Files) -> Tokenizer:
    """Ignores add_bos_token: tokenizer.json defines its own post-processor."""
    path, templates = files.path, files.templates
    try:
        fast = FastTokenizer.from_buffer(files.content)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"cannot read {path}: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    own = fast.get_added_tokens_decoder()
    declared = files.declare(own)
    _add_tokens(fast, declared, path)
    byte_level, strips = decoder_traits(fast, path)
    added = own.items() | fast.get_added_tokens_decoder().items()
    traits = TokenizerTraits(
        vocab_size=max(fast.get_vocab().values(), default=-1) + 1,
        byte_level=byte_level,
        strips_leading_space=strips,
        special_ids=frozenset(i for i, token in added if token.special),
        special_tokens=declared.names,
        eos_token_ids=first_known(FastBackend(fast), [declared.names.get("eos_token")]),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
    )
    return Tokenizer(FastBackend(fast), traits)


def _sentencepiece(files: _Files) -> Tokenizer:
    config, templates, declared = files.config, files.templates, files.declare({})
    try:
        backend = SentencePieceBackend(
            files.content,
            added=declared.by_id,
            named=declared.in_order()[len(declared.by_id) :],
            add_bos=bool(config.get("add_bos_token", True)),
            add_eos=bool(config.get("add_eos_token", False)),
            legacy=bool(config.get("legacy", True)),
        )
    except ConfigError as error:
        raise ConfigError(
            f"{files.path}: {error}; if the model has a tokenizer.json, put it into this folder"
        ) from None
    named = backend.control_tokens() | declared.names
    texts = [token.content for token in declared.in_order() if token.special]
    traits = TokenizerTraits(
        vocab_size=backend.vocab_size,
        byte_level=False,
        strips_leading_space=backend.adds_prefix_space,
        special_ids=backend.control_ids() | set(first_known(backend, [*named.values(), *texts])),
        special_tokens=named,
        eos_token_ids=first_known(backend, [named.get("eos_token")]),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
    )
    return Tokenizer(backend, traits)


def _declared_tokens(
    folder: Path,
    config: dict[str, Any],
    known: dict[int, AddedToken],
    read: ReadFile = read_file,
) -> AddedTokens:
    try:
        return read_added_tokens(
            config,
            _read_json(folder / "special_tokens_map.json", read),
            _read_json(folder / "added_tokens.json", read),
            known,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}: the added tokens in tokenizer_config.json, special_tokens_map.json or "
            f"added_tokens.json cannot be read: {error!r}"
        ) from None


def _add_tokens(fast: FastTokenizer, declared: AddedTokens, path: Path) -> None:
    """Adds the declared tokens, so that `encode` finds them in a text."""
    fast.add_tokens(declared.in_order(fast.get_added_tokens_decoder().values()))
    for token_id, token in sorted(declared.by_id.items()):
        if fast.token_to_id(token.content) != token_id:
            raise ConfigError(
                f"{path}: tokenizer_config.json gives {token.content!r} id {token_id}, "
                f"tokenizer.json {fast.token_to_id(token.content)}: download both files again"
            )


def _chat_templates(folder: Path, config: dict[str, Any], read: ReadFile) -> dict[str, str]:
    """Returns the chat templates by name. The name "default" may be missing."""
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    named = {file.stem: content.decode("utf-8") for file in more if (content := read(file))}
    return _main_templates(folder, config, read) | named


def _main_templates(folder: Path, config: dict[str, Any], read: ReadFile) -> dict[str, str]:
    """Returns the templates of two files; chat_template.jinja goes first, as in Hugging Face's
    loader."""
    named: dict[str, Any] = {}
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
    elif template is not None:
        named = {"default": template}
    content = read(folder / "chat_template.jinja")
    if content is not None:
        named = {"default": content.decode("utf-8")}
    return {str(name): source for name, source in named.items() if isinstance(source, str)}


def _own_template(value: str) -> str:
    """Returns the template in a file, or `value` itself if it is Jinja.

    Raises:
        ConfigError: `value` is neither.
    """
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if any(mark in value for mark in ("{{", "{%", "\n")):
            return value
        raise ConfigError(f"chat_template {value}: {error}") from None


def _read_json(path: Path, read: ReadFile = read_file) -> dict[str, Any]:
    """Returns the object in a JSON file, {} if there is no such file."""
    content = read(path)
    if content is None:
        return {}
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value
