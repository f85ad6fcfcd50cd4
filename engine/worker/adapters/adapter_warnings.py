"""Finds parts of an adapter's folder that this engine does not use, so that it can say so."""

import logging
import re
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.engine.adapters.open_file import FileTooLargeError, read_text_file
from loraplex.engine.adapters.peft_config import read_peft_config
from loraplex.engine.config import ModelConfig

if TYPE_CHECKING:
    from loraplex.engine.tokenizer.loading import TextSettings

logger = logging.getLogger("loraplex")

_TEXT_FILES = (
    "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_MAX_BYTES = 4 << 20
_MAX_LISTED = 5


class AdapterWarnings:
    """Compares adapters with the base model. Any thread may call it."""

    def __init__(self, config: ModelConfig, model_path: Path) -> None:
        self._config = config
        self._model_path = model_path
        self._lock = threading.Lock()
        self._base: TextSettings | None = None  # read for the first adapter that has its own

    def __call__(self, folder: Path, root: str = "") -> list[str]:
        """Returns a sentence for each part of `folder` that is ignored; [] if there is none.

        `root` is that of open_regular_file.
        """
        try:
            return self._find(folder, root)
        except Exception as error:  # files that the engine does not need may hold anything
            logger.info("the adapter in %s cannot be compared with the base: %s", folder, error)
            return []

    def _find(self, folder: Path, root: str) -> list[str]:
        config = read_peft_config(folder, root)
        found = []
        if config.unknown:
            found.append(f"options of its config are ignored: {_listed(config.unknown)}")
        if config.base_model and not _same_model(config.base_model, self._model_path):
            found.append(
                f"it was trained on {config.base_model}, and the base model is {self._model_path}"
            )
        if not any((folder / name).is_file() for name in _TEXT_FILES):
            return found
        try:
            read = partial(read_text_file, root=root, max_bytes=_MAX_BYTES)
            own = _read_settings(folder, read=read)
        except FileTooLargeError as error:
            return [*found, f"{error}: too large to be compared with the base model's"]
        if own.chat_template or own.eos_token:
            found += _text_warnings(own, self._base_settings())
        return found

    def _base_settings(self) -> "TextSettings":
        with self._lock:
            if self._base is None:
                path = Path(self._config.tokenizer or self._model_path).expanduser()
                self._base = _read_settings(path, self._config.chat_template)
            return self._base


def _read_settings(path: Path, chat_template: str = "", **options: Any) -> "TextSettings":
    # The tokenizer's libraries are not among those that a worker loads at its start.
    from loraplex.engine.tokenizer.loading import read_text_settings

    return read_text_settings(path, chat_template, **options)


def _text_warnings(own: "TextSettings", base: "TextSettings") -> list[str]:
    found = []
    if own.chat_template and own.chat_template.strip() != (base.chat_template or "").strip():
        found.append(
            "its chat template is not used, unless its tokenizer adds tokens, and differs from the "
            "base model's: give it with --chat-template, or to LLM.chat as chat_template"
        )
    if own.eos_token and base.eos_token and own.eos_token != base.eos_token:
        found.append(
            f"its end token {own.eos_token!r} is not used, unless its tokenizer adds tokens: give "
            "its id in stop_token_ids where the base model does not end with it"
        )
    return found


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")


def _same_model(name: str, path: Path) -> bool:
    """Tells whether the last part of a model's name occurs in the path of the served model."""
    wanted = _words(name.rstrip("/").rpartition("/")[2])
    return wanted in _words(str(path)) or name == str(path)


def _words(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())
