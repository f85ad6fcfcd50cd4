"""The grammar library sees the bytes that the tokenizer decodes to."""

from pathlib import Path

import pytest

from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.grammar.vocabulary import Vocabulary
from loraplex.engine.tokenizer.loading import load_tokenizer

from helpers.models.hf_models import make_tokenizer
from helpers.models.sentencepiece_models import train_sentencepiece


@pytest.fixture(params=["smollm2", "byte level", "sentencepiece"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "smollm2":
        return resolve_model("")
    if request.param == "byte level":
        make_tokenizer(tmp_path)
    else:
        (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    return tmp_path


def test_each_token_has_the_tokenizers_bytes(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    for token_id in range(tokenizer.vocab_size):
        if tokenizer.token_bytes(token_id) == b"\xff":  # a byte of no UTF-8 text
            assert vocabulary.token_bytes(token_id) == b""
            continue
        expected = tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        raw = vocabulary.token_bytes(token_id) * 2
        text = raw.decode("utf-8", "replace")
        assert (text.removeprefix(" ") if tokenizer.strips_leading_space else text) == expected
        assert vocabulary.token_bytes(token_id) == tokenizer.token_bytes(token_id)


@pytest.mark.parametrize("size", [390, 400, 416, 512])
def test_a_mask_is_as_wide_as_the_logits_and_excludes_padding(tmp_path: Path, size: int) -> None:
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = Vocabulary(tokenizer, size)
    mask = int.from_bytes(vocabulary.fit_mask(b"\xff" * 100).tobytes(), "little")
    num_tokens = min(size, tokenizer.vocab_size)
    assert mask == (1 << num_tokens) - 1
    assert len(vocabulary.fit_mask(b"\xff" * 100)) == -(-size // 32)
