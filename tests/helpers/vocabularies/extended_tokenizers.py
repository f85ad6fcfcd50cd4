"""Tokenizers in adapters' folders that add tokens to the base model's."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

TEMPLATE = (
    "{% for message in messages %}<tool>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<tool>{% endif %}"
)


def extend_tokenizer(base: Path, folder: Path, tokens: list[str]) -> None:
    """Saves the tokenizer of `base` in `folder` with more tokens and a chat template of its own.

    Tokens in <|...|> are special, and "<|end|>" is the end of sequence.
    """
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for token in tokens:
        is_special = token.startswith("<|")
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=not is_special)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
