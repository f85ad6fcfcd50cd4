"""LLM.get_tokenizer: transformers' class for a Hugging Face folder."""

from pathlib import Path

import pytest

from loraplex.engine.tokenizer.hugging_face import load_hugging_face

transformers = pytest.importorskip("transformers")


def make_folder(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = models.WordLevel({"hello": 0, "world": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(path)
    return path


def test_a_folder_gives_transformers_class(tmp_path: Path) -> None:
    loaded = load_hugging_face(make_folder(tmp_path))
    assert isinstance(loaded, transformers.PreTrainedTokenizerBase)
    assert loaded.encode("hello world") == [0, 1]
    messages = [{"role": "user", "content": "hello"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "hello"


def test_the_engines_template_replaces_the_files(tmp_path: Path) -> None:
    loaded = load_hugging_face(make_folder(tmp_path), "world {{ messages[0].content }}")
    messages = [{"role": "user", "content": "hello"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "world hello"


def test_other_files_are_left_to_the_engine(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert load_hugging_face(gguf) is None
    assert load_hugging_face(tmp_path / "nothing") is None
    (tmp_path / "empty").mkdir()
    assert load_hugging_face(tmp_path / "empty") is None
