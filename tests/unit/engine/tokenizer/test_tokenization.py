"""Tokenizers from Hugging Face files, against `transformers`, `tokenizers` and `sentencepiece`."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from loraplex.engine.errors import ConfigError
from loraplex.engine.tokenizer.loading import load_tokenizer
from loraplex.engine.tokenizer.tokenizer import Tokenizer, byte_level_bytes, dangling_bytes

from helpers.models.hf_models import make_tokenizer
from helpers.models.sentencepiece_models import train_sentencepiece

TEXTS = (
    "",
    " ",
    "Hello, world!  Two  spaces.",
    "  leading and trailing  ",
    "Grüße 你好 Привет 👩‍🚀🚀",
    "tabs\tand\n\nnewlines\r\n",
    "<s>[INST] hi [/INST]</s> again",
    "1234567 3.14",
    "nul \x00 and e\u0301",
)


def _edit_config(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    config.update(values)
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def fast_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fast")
    make_tokenizer(path)
    return path


@pytest.fixture
def spm_dir(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    return tmp_path


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": True}])
def test_tokenizer_json_equals_transformers(tmp_path: Path, flags: dict[str, bool]) -> None:
    make_tokenizer(tmp_path)
    _edit_config(tmp_path, **flags)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.bos_token_id == theirs.bos_token_id == 1
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.special_ids == set(theirs.all_special_ids) | {3, 4}
    assert ours.vocab_size == len(theirs)
    assert ours.id_to_token(3) == "<|im_start|>" and ours.token_to_id("<|im_start|>") == 3
    assert ours.id_to_token(ours.vocab_size) is None and ours.token_to_id("nothing") is None


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 383), max_size=20), skip=st.booleans())
def test_decode_of_any_ids_equals_the_library(fast_dir: Path, ids: list[int], skip: bool) -> None:
    library = FastTokenizer.from_file(str(fast_dir / "tokenizer.json"))
    assert load_tokenizer(fast_dir).decode(ids, skip) == library.decode(ids, skip)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    fast = make_tokenizer(tmp_path)
    fast.enable_truncation(4)
    fast.enable_padding(length=50)
    fast.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(tmp_path).encode("one two three four five six")
    assert 4 < len(ids) < 50


def test_tokens_only_in_the_config_are_added(tmp_path: Path) -> None:
    size = make_tokenizer(tmp_path).get_vocab_size()
    entry = {"content": "<tool>", "special": True}
    _edit_config(tmp_path, added_tokens_decoder={str(size): entry})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<tool>", add_special_tokens=False) == [size]
    assert tokenizer.decode([size]) == "" and tokenizer.decode([size], False) == "<tool>"
    _edit_config(tmp_path, added_tokens_decoder={str(size + 7): entry})
    with pytest.raises(ConfigError, match=r"<tool>.* id"):
        load_tokenizer(tmp_path)


def test_a_file_or_another_folder_may_be_named(tmp_path: Path, fast_dir: Path) -> None:
    want = load_tokenizer(fast_dir).encode("hi")
    for name in (str(fast_dir), str(fast_dir / "tokenizer.json")):
        assert load_tokenizer(tmp_path, name).encode("hi") == want


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path, "gpt2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read"):
        load_tokenizer(tmp_path)
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="decoder WordPiece is not supported"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("aGVsbG8= 0\n")  # Llama 3's own format
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def _processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30) | st.text("ab  is\n▁", max_size=30))
def test_sentencepiece_equals_the_library(text: str) -> None:
    tokenizer, library = _spm(), _processor()
    ids = tokenizer.encode(text)
    assert ids == [1, *library.encode(text)]
    assert tokenizer.decode(ids) == library.decode(ids[1:])


@cache
def _spm(**flags: bool) -> Tokenizer:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "tokenizer.model").write_bytes(train_sentencepiece())
        _edit_config(Path(name), **flags)
        return load_tokenizer(Path(name))


def test_sentencepiece_special_tokens_split_the_text() -> None:
    library = _processor()
    parts = library.encode("one"), library.encode("two")
    legacy = _spm()
    assert legacy.encode("one</s>two") == [1, *parts[0], 2, *parts[1]]
    assert legacy.encode("one</s>two", add_special_tokens=False) == [*parts[0], 2, *parts[1]]
    modern = _spm(legacy=False)
    assert modern.encode("one") == legacy.encode("one")
    assert modern.decode(modern.encode("one</s>two"), False) == "<s> one</s>two"
    assert legacy.decode(legacy.encode("one</s>two"), False) == "<s> one</s> two"
    with_eos = _spm(add_bos_token=False, add_eos_token=True)
    assert with_eos.encode("one") == [*parts[0], 2]


def test_sentencepiece_properties(spm_dir: Path) -> None:
    (spm_dir / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 420}))
    _edit_config(spm_dir, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(spm_dir)
    assert tokenizer.vocab_size == 421
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids == (420,)
    assert tokenizer.special_ids == {0, 1, 2, 420}
    assert tokenizer.encode("a<|im_end|>")[-1] == 420
    assert tokenizer.id_to_token(420) == "<|im_end|>" and tokenizer.id_to_token(421) is None
    assert tokenizer.decode(tokenizer.encode("漢字"), True) == "漢字"  # through byte pieces
    assert tokenizer.token_to_id("no such piece") is None


def test_byte_fallback_decoder_of_tokenizer_json(tmp_path: Path) -> None:
    """Llama 2's tokenizer.json: ▁ for spaces, bytes as pieces, one leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "a"]
    fast = FastTokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    for strip in (True, False):
        more = [decoders.Strip(" ", 1, 0)] if strip else []
        fast.decoder = decoders.Sequence(steps + more)
        fast.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        emoji = [3 + byte for byte in "🚀é".encode()]
        for ids in ([260, 261, 260], [259, 260], emoji, [261, *emoji, 260], []):
            assert tokenizer.decode(ids) == fast.decode(ids)


@pytest.mark.parametrize(
    ("raw", "tail"),
    [
        (b"", b""),
        (b"abc", b""),
        ("é".encode(), b""),
        ("é".encode()[:1], b"\xc3"),
        (b"x" + "🚀".encode()[:3], "🚀".encode()[:3]),
        (b"\x80\x80\x80", b""),
        (b"\xff", b""),
        ("你".encode()[:2], "你".encode()[:2]),
    ],
)
def test_dangling_bytes(raw: bytes, tail: bytes) -> None:
    assert dangling_bytes(raw) == tail


def test_byte_level_alphabet_is_the_librarys() -> None:
    alphabet = ByteLevel.alphabet()
    assert sorted(byte_level_bytes(c)[0] for c in alphabet) == list(range(256))
    assert byte_level_bytes("Ġhi") == b" hi"
    assert byte_level_bytes("<a b>") == b"<a b>"
