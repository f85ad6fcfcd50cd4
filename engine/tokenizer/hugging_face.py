"""Loads a folder's tokenizer as transformers' class, where transformers is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def load_hugging_face(folder: Path, chat_template: str | None = None) -> Any:
    """Returns AutoTokenizer's tokenizer; None for other files than a folder's, without
    transformers, and where transformers cannot read them.

    Args:
        chat_template: Jinja source that replaces the chat template of the files.
    """
    if not folder.is_dir() or find_spec("transformers") is None:
        return None
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError):  # the engine reads more kinds
        return None
    if chat_template is not None:
        loaded.chat_template = chat_template
    return loaded
