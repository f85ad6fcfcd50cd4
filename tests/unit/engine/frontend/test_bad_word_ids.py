"""Bad words of a request: their spellings as token ids, their checks and their limits."""

from itertools import accumulate
from typing import Any

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ClientError
from loraplex.engine.frontend.inputs import InputProcessor, TextCodec
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.frontend.structured.bad_words import encode_bad_words
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.tokenizer.tokenizer import Tokenizer, TokenizerTraits
from loraplex.scheduler.worker_protocol import SamplingSpec, WorkerReady

SPELLINGS = {
    "ha": [1], " ha": [2],  # one token each
    "so": [3], " so": [9, 3],  # a space of its own: the first spelling forbids both
    "Ca": [4, 5], " Ca": [6],  # shorter after a space
    "to": [7, 5], " to": [7, 8],  # the same beginning
    "  ": [], " ": [9],
}  # fmt: skip


class Spellings:
    """A tokenizer library that knows a few texts."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return SPELLINGS[text]

    def id_to_piece(self, token_id: int) -> str | None:
        return None

    def piece_to_id(self, piece: str) -> int | None:
        return None


SPELLER = Tokenizer(Spellings(), TokenizerTraits(10, byte_level=True, strips_leading_space=False))


def processor(codec: TextCodec | None, vocab_size: int = 384) -> InputProcessor:
    ready = WorkerReady(0, 10, 64, 1, 32, vocab_size, "cpu", "torch", "torch")
    info = EngineInfo(
        max_model_len=32,
        vocab_size=vocab_size,
        num_pages=10,
        block_tokens=16,
        max_queue_len=10,
        workers=[ready],
    )
    return InputProcessor(EngineConfig(), info, codec, "frontend 0")


def sequences_of(spec: SamplingSpec) -> list[list[int]]:
    ends = list(accumulate(spec.bad_word_lengths))
    ids = spec.bad_word_ids.tolist()
    return [ids[end - n : end] for end, n in zip(ends, spec.bad_word_lengths, strict=True)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ha"], [[1], [2]]),
        (["  ha"], [[1], [2]]),
        (["so"], [[3]]),
        (["Ca"], [[4, 5], [6]]),
        (["to", "ha", "to"], [[7, 5], [7, 8], [1], [2]]),
    ],
)
def test_words_are_spelled_with_and_without_a_space(
    words: list[str], expected: list[list[int]]
) -> None:
    assert encode_bad_words(SPELLER, words) == expected


@pytest.mark.parametrize("word", [" ", "  "])
def test_a_word_without_tokens_is_refused(word: str) -> None:
    with pytest.raises(ClientError, match="has no tokens"):
        encode_bad_words(SPELLER, [word])


def test_each_of_the_n_answers_has_them(codec: TextCodec) -> None:
    words = ["Paris", "München"]
    encode = codec.tokenizer.encode
    expected = [encode(space + word, False) for word in words for space in ("", " ")]
    specs = processor(codec).sampling_specs(SamplingParams(n=3, bad_words=words), 4)
    assert [sequences_of(spec) for spec in specs] == [expected] * 3
    assert any(len(ids) > 2 for ids in expected)
    (plain,) = processor(codec).sampling_specs(SamplingParams(), 4)
    assert sequences_of(plain) == []


def test_spellings_outside_the_models_vocabulary_are_left_out(codec: TextCodec) -> None:
    low = processor(codec, vocab_size=300)
    (spec,) = low.sampling_specs(SamplingParams(bad_words=["Paris", "a"]), 4)
    ids = codec.tokenizer.encode(" a", False)
    assert max(ids) < 300 or ids not in sequences_of(spec)
    assert codec.tokenizer.encode("a", False) in sequences_of(spec)
    assert all(max(sequence) < 300 for sequence in sequences_of(spec))


def test_they_need_a_tokenizer() -> None:
    with pytest.raises(ClientError, match="bad_words needs a tokenizer"):
        processor(None).sampling_specs(SamplingParams(bad_words=["x"]), 4)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("word", TypeError, "must be a list of strings"),
        ([1], TypeError, "must be a list of strings"),
        (["a", ""], ValueError, "must not be empty"),
        (["x"] * 1025, ValueError, "at most 1024 entries"),
        (["x" * 16385], ValueError, "at most 16384 characters"),
    ],
)
def test_wrong_values_are_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(bad_words=value)


def test_they_survive_the_wire() -> None:
    params = SamplingParams(bad_words=["a", " b"])
    assert params.to_wire() == {"bad_words": ["a", " b"]}
    assert SamplingParams.from_wire(params.to_wire()) == params
