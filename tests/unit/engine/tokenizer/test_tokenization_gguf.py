"""Tokenizers from GGUF metadata: SmolLM2's, and vocabularies written for the test."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.errors import ConfigError
from loraplex.engine.tokenizer.loading import load_tokenizer
from loraplex.engine.tokenizer.tokenizer import Tokenizer

from helpers.models.gguf_files import write_tokenizer_gguf
from helpers.models.gguf_reader import plain_views
from helpers.models.hf_models import make_tokenizer
from helpers.models.sentencepiece_models import train_sentencepiece

TEXTS = (
    "The quick brown fox doesn't jump over   the lazy dog.",
    "Grüße aus München! 你好，世界。 Привет 👩‍🚀🚀",
    "def f(x):\n    return x  # two  spaces\n\n\tok\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "I'LL don't we're e\u0301 \u00a0 nbsp",
    "",
)


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return load_tokenizer(resolve_model(""))


@pytest.fixture(scope="module")
def smollm_hf() -> Any:
    path = resolve_model("")
    with plain_views():
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm_equals_hugging_faces_conversion(smollm: Tokenizer, smollm_hf: Any) -> None:
    """Without digits, which that conversion does not split."""
    for text in TEXTS:
        ids = smollm.encode(text, add_special_tokens=False)
        assert ids == smollm_hf.encode(text, add_special_tokens=False), text
        assert smollm.decode(ids, False) == text
        assert smollm.decode(ids) == smollm_hf.decode(ids, skip_special_tokens=True)


def test_smollm_splits_digits(smollm: Tokenizer) -> None:
    pieces = [smollm.id_to_token(i) for i in smollm.encode("In 1984, 3.14 x42")]
    assert pieces == ["In", "Ġ", "1", "9", "8", "4", ",", "Ġ", "3", ".", "1", "4", "Ġx", "4", "2"]


def test_smollm_properties(smollm: Tokenizer) -> None:
    assert smollm.vocab_size == 49152
    assert smollm.eos_token_ids == (2,) and smollm.bos_token_id == 1
    assert smollm.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm.special_ids == set(range(17))
    assert smollm.encode("hi") == smollm.encode("hi", add_special_tokens=False)  # adds no BOS
    chat = [{"role": "user", "content": "hi"}]
    assert smollm.apply_chat_template(chat) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def smollm_bytes(smollm: Tokenizer) -> set[bytes]:
    return {smollm.token_bytes(i) for i in range(smollm.vocab_size)}


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_smollm_round_trips_the_bytes_it_knows(
    smollm: Tokenizer, smollm_bytes: set[bytes], text: str
) -> None:
    """Its vocabulary lacks 21 bytes, most of them control characters and never used in UTF-8."""
    text = "".join(c for c in text if all(bytes([b]) in smollm_bytes for b in c.encode()))
    assert smollm.decode(smollm.encode(text), skip_special_tokens=False) == text


def _bpe_file(path: Path, **keys: Any) -> Path:
    """The tiny BPE tokenizer of helpers/hf_models.py as GGUF metadata."""
    model = make_tokenizer(path / "hf")
    state = json.loads(model.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in state["merges"]]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 5 + [1] * (len(tokens) - 5),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **keys,
    }
    file = path / "tokenizer.gguf"
    write_tokenizer_gguf(file, **{k: v for k, v in values.items() if v is not None})
    return file


def test_pre_tokenizers_cut_numbers_differently(tmp_path: Path) -> None:
    """The tiny vocabulary has the merge "1 9" ... only where its words reach across digits."""
    pieces = {}
    for pre in ("smollm", "qwen2", "llama-bpe"):
        tokenizer = load_tokenizer(_bpe_file(tmp_path, pre=pre))
        ids = tokenizer.encode("1984 is", add_special_tokens=False)
        assert tokenizer.decode(ids) == "1984 is"
        pieces[pre] = [tokenizer.id_to_token(i) for i in ids]
    assert pieces["smollm"][:4] == pieces["qwen2"][:4] == ["1", "9", "8", "4"]


def test_bos_and_eos_flags(tmp_path: Path) -> None:
    plain = load_tokenizer(_bpe_file(tmp_path)).encode("a")
    assert load_tokenizer(_bpe_file(tmp_path, add_bos_token=True)).encode("a") == [1, *plain]
    assert load_tokenizer(_bpe_file(tmp_path, add_eos_token=True)).encode("a") == [*plain, 2]
    assert load_tokenizer(_bpe_file(tmp_path, pre="llama-bpe")).encode("a") == [1, *plain]
    ends = load_tokenizer(_bpe_file(tmp_path, eot_token_id=4, eom_token_id=2))
    assert ends.eos_token_ids == (2, 4)


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    types = [3, 3, 3, 3, 4] + [1] * 379
    tokenizer = load_tokenizer(_bpe_file(tmp_path, token_type=types))
    assert tokenizer.encode("<|im_end|>") == [4]
    assert tokenizer.decode([3, 4]) == "<|im_end|>"


def test_qwen2_normalizes_to_nfc(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_bpe_file(tmp_path, pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm' is not supported"),
        ({"pre": None}, "pre-tokenizer 'default' is not supported"),
        ({"model": "bert"}, "tokenizer model 'bert' is not supported"),
        ({"model": None, "tokens": None}, "holds no tokenizer"),
        ({"merges": ["no such"]}, "out of vocabulary"),
    ],
)
def test_unsupported_tokenizers_are_refused(
    keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        load_tokenizer(_bpe_file(tmp_path, **keys))
    assert "--tokenizer" in str(refusal.value)


def _sentencepiece_file(path: Path, **keys: Any) -> Path:
    model = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    size = model.get_piece_size()
    types = [2, 3, 3] + [6 if model.is_byte(i) else 1 for i in range(3, size)]
    values = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in range(size)],
        "scores": [float(model.get_score(i)) for i in range(size)],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **keys,
    }
    write_tokenizer_gguf(path, **values)
    return path


@pytest.fixture(scope="module")
def spm_from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(_sentencepiece_file(tmp_path_factory.mktemp("spm") / "t.gguf"))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30) | st.text("ab  is\n▁", max_size=30))
def test_sentencepiece_vocabulary_equals_the_library(spm_from_gguf: Tokenizer, text: str) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    ids = spm_from_gguf.encode(text)
    assert ids == [1, *library.encode(text)]
    assert spm_from_gguf.decode(ids) == library.decode(ids[1:])


def test_sentencepiece_properties(tmp_path: Path, spm_from_gguf: Tokenizer) -> None:
    assert spm_from_gguf.special_ids == {0, 1, 2}
    assert spm_from_gguf.bos_token_id == 1 and spm_from_gguf.eos_token_ids == (2,)
    assert spm_from_gguf.encode("a</s>", add_special_tokens=False)[-1] == 2
    bare = _sentencepiece_file(tmp_path / "b.gguf", add_space_prefix=False, add_bos_token=False)
    tokenizer = load_tokenizer(bare)
    assert tokenizer.encode("The")[0] != spm_from_gguf.encode("The")[1]
    assert tokenizer.decode(tokenizer.encode(" The")) == " The"
