"""Special tokens that only the files beside a vocabulary name, against `transformers`."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from loraplex.engine.errors import ConfigError
from loraplex.engine.tokenizer.loading import load_tokenizer

from helpers.models.hf_models import make_tokenizer
from helpers.models.sentencepiece_models import train_sentencepiece

OWN = {"<own>": 384, "<soft>": 385}  # added tokens of tokenizer.json, the second is not special
NEW = ("<a>", "<b b>", "<|im_end|>", "e", "zq")  # "e" is a piece of the vocabulary
TEXT = "x <a> <b b>\ty<|im_end|> <own> <soft> e zq z"

_FLAGS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("lstrip", "rstrip", "normalized", "special")},
    optional={"single_word": st.booleans()},
)


@st.composite
def _files(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Contents of tokenizer_config.json and the legacy files, with tokens from NEW."""
    config: dict[str, Any] = {}
    new = draw(st.permutations(NEW))
    if draw(st.booleans()):
        fresh = [token for token in new if token not in ("<|im_end|>", "e")]
        ids = dict(zip(fresh, range(386, 389), strict=True)) | OWN
        listed = draw(st.sets(st.sampled_from(sorted(OWN)))) | set(fresh[: draw(st.integers(0, 3))])
        config["added_tokens_decoder"] = {
            str(ids[token]): {"content": token, **draw(_FLAGS)} for token in sorted(listed)
        }
    for name in draw(st.sets(st.sampled_from(["eos_token", "pad_token", "image_token"]))):
        config[name] = draw(st.sampled_from([*NEW, *OWN]))
    key = draw(st.sampled_from(["additional_special_tokens", "extra_special_tokens"]))
    config[key] = draw(st.lists(st.sampled_from(NEW), max_size=3, unique=True))
    special_map = {"eos_token": "zq"} if draw(st.booleans()) else {}
    added = {"<a>": 386} if draw(st.booleans()) else {}
    return {"tokenizer_config": config, "special_tokens_map": special_map, "added_tokens": added}


def _write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    fast = make_tokenizer(folder)
    fast.add_tokens([AddedToken(token, special=token == "<own>") for token in OWN])
    fast.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    files["tokenizer_config"] = {**json.loads(path.read_text()), **files["tokenizer_config"]}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@settings(max_examples=60, deadline=None)
@given(files=_files())
def test_declared_tokens_equal_transformers(files: dict[str, dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        _write(Path(name), files)
        ours, theirs = load_tokenizer(Path(name)), AutoTokenizer.from_pretrained(name)
    ids = theirs.encode(TEXT)
    assert ours.encode(TEXT) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map


def test_a_piece_that_the_config_calls_special_is_found_whole(tmp_path: Path) -> None:
    """Qwen's and Mistral's fine-tunes: the vocabulary has the piece, only the config its role."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|im_end|>"]
    path.write_text(json.dumps(content))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|im_end|>", False)[1:] == [4]
    assert tokenizer.eos_token_ids == (4,)
    assert tokenizer.decode([4]) == ""


def test_sentencepiece_finds_tokens_that_only_the_config_names(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    end = {"content": "<end>", "lstrip": True, "rstrip": True, "special": True}
    config = {
        "eos_token": "is",
        "additional_special_tokens": ["<x>"],
        "added_tokens_decoder": {"420": end},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    piece = tokenizer.token_to_id("is")
    one, two = tokenizer.encode("one", False), tokenizer.encode("two", False)
    assert tokenizer.eos_token_ids == (piece,)
    assert tokenizer.encode("one<x>two", False) == [*one, 421, *two]
    assert tokenizer.encode("oneistwo", False) == [*one, piece, *two]
    assert tokenizer.encode("one \n<end> \ttwo", False) == [*one, 420, *two]
    assert tokenizer.decode([*one, 421, 420, piece]) == "one"
    assert tokenizer.vocab_size == 422


@pytest.mark.parametrize("entries", [{"x": {"content": "a"}}, {"5": {}}, {"5": "a"}, ["a"]])
def test_damaged_declarations_are_configuration_errors(tmp_path: Path, entries: Any) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(ConfigError, match="added tokens in tokenizer_config.json"):
        load_tokenizer(tmp_path)
