"""Tokenizers that adapters bring: which files count, and what may differ from the base's."""

import json
import os
import shutil
from pathlib import Path

import pytest

from loraplex.engine.adapters.open_file import OutsideRootError, file_reader
from loraplex.engine.errors import ConfigError
from loraplex.engine.tokenizer.adapter_tokenizer import check_extends, load_adapter_tokenizer
from loraplex.engine.tokenizer.loading import load_tokenizer
from loraplex.engine.tokenizer.tokenizer import Tokenizer

from helpers.models.hf_models import make_tokenizer
from helpers.vocabularies.extended_tokenizers import TEMPLATE, extend_tokenizer

TEXT = "a <tool> page"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_tokenizer(path)
    return path


def has_added(own: Tokenizer, base: Path, num_rows: int = 400, num_base_rows: int = 400) -> bool:
    return check_extends(own, load_tokenizer(base), num_rows=num_rows, num_base_rows=num_base_rows)


def test_a_tokenizer_with_more_tokens(base: Path, tmp_path: Path) -> None:
    extend_tokenizer(base, tmp_path, ["<tool>", "<|end|>"])
    own = load_adapter_tokenizer(tmp_path, base)
    assert own is not None and has_added(own, base)
    assert 384 in own.encode(TEXT) and own.eos_token_ids == (385,)
    assert own.chat_template == TEMPLATE


@pytest.mark.parametrize(
    "names", [[], ["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]]
)
def test_copies_of_the_bases_files_are_not_loaded(
    base: Path, tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        shutil.copy(base / name, tmp_path)
    assert load_adapter_tokenizer(tmp_path, base) is None
    assert load_adapter_tokenizer(tmp_path, base / "tokenizer.json") is None


def test_other_settings_with_the_same_tokens(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    own = load_adapter_tokenizer(tmp_path, base)
    assert own is not None and not has_added(own, base)


def test_added_tokens_without_a_vocabulary(base: Path, tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 384}))
    own = load_adapter_tokenizer(tmp_path, base)
    assert own is not None and has_added(own, base)
    assert 384 in own.encode(TEXT)
    with pytest.raises(ConfigError, match=r"needs a tokenizer.json or tokenizer.model"):
        load_adapter_tokenizer(tmp_path, base / "model.gguf")


def test_files_that_lead_out_of_the_root(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "root" / "adapter"
    folder.mkdir(parents=True)
    read = file_reader(folder, [str(folder.parent)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(base / name)
        with pytest.raises(OutsideRootError, match="leads out of"):
            load_adapter_tokenizer(folder, base, read)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert load_adapter_tokenizer(folder, base, read) is None
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="is not on this machine"):
        load_adapter_tokenizer(tmp_path / "absent", base, read)


def test_tokens_with_other_ids(base: Path, tmp_path: Path) -> None:
    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|tool|>"), "utf-8")
    own = load_adapter_tokenizer(tmp_path, base)
    assert own is not None
    with pytest.raises(ConfigError, match=r"token 4 is '<\|tool\|>' there and '<\|im_end\|>' in"):
        has_added(own, base)
    make_tokenizer(tmp_path, vocab_size=300)
    own = load_adapter_tokenizer(tmp_path, base)
    assert own is not None
    with pytest.raises(ConfigError, match="token 300 is None there"):
        has_added(own, base)


def test_tokens_without_rows(base: Path, tmp_path: Path) -> None:
    extend_tokenizer(base, tmp_path, ["<tool>", "<|end|>"])
    own = load_tokenizer(tmp_path)
    assert has_added(own, base, num_rows=386, num_base_rows=384)
    with pytest.raises(
        ConfigError, match=r"the token '<\|end\|>' with id 385.*rows for 385 tokens"
    ):
        has_added(own, base, num_rows=385)
    plain = load_tokenizer(base)
    assert not has_added(plain, base, num_rows=380, num_base_rows=380)  # the model lacks them too
    with pytest.raises(ConfigError, match="with id 380, but the adapter has rows for 380 tokens"):
        has_added(plain, base, num_rows=380)
