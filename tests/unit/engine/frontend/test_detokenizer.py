"""The incremental detokenizer: any grouping of tokens gives the text of a full decode."""

import tempfile
import tracemalloc
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.frontend.detokenizer import IncrementalDetokenizer
from loraplex.engine.tokenizer.loading import load_tokenizer
from loraplex.engine.tokenizer.tokenizer import Tokenizer

from helpers.models.hf_models import make_tokenizer
from helpers.models.sentencepiece_models import train_sentencepiece

REPLACEMENT = "\ufffd"


@cache
def _tokenizer(kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as name:
        if kind == "byte_level":
            make_tokenizer(Path(name))
        else:
            (Path(name) / "tokenizer.model").write_bytes(train_sentencepiece())
        return load_tokenizer(Path(name))


KINDS = ("byte_level", "sentencepiece")
SPEECH = st.text("Paris is it né 你🚀👩‍🚀\n", max_size=25)


@st.composite
def _tokens(draw: st.DrawFn, kind: str) -> list[int]:
    """Ids of real text and of nonsense, special and broken ones among them."""
    tokenizer = _tokenizer(kind)
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            ids += tokenizer.encode(draw(SPEECH), draw(st.booleans()))
        else:
            ids += draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=6))
    return ids


def _run(detokenizer: IncrementalDetokenizer, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    """Returns the text of each push and of the flush."""
    parts, start = [], 0
    for cut in [*sorted(cuts), len(ids)]:
        parts.append(detokenizer.push(ids[start:cut]))
        start = cut
    return [*parts, detokenizer.flush()]


def _text(kind: str, ids: Sequence[int], cuts: Sequence[int] = (), **options: Any) -> str:
    return "".join(_run(IncrementalDetokenizer(_tokenizer(kind), **options), ids, cuts))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_joined_text_is_the_full_decode(kind: str, data: st.DataObject) -> None:
    ids, prompt = data.draw(_tokens(kind)), data.draw(_tokens(kind))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    skip = data.draw(st.booleans())
    tokenizer = _tokenizer(kind)
    text = _text(kind, ids, cuts, skip_special_tokens=skip)
    assert text == tokenizer.decode(ids, skip)
    whole = tokenizer.decode([*prompt, *ids], skip)
    got = _text(kind, ids, cuts, prompt_token_ids=prompt, skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip)
    assert whole.endswith(got)
    assert whole == before + got or (
        # a character that the prompt broke off counts as output
        before.endswith(REPLACEMENT) and whole == before[:-1] + got
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_strings_do_not_depend_on_the_grouping(kind: str, data: st.DataObject) -> None:
    ids = data.draw(_tokens(kind))
    whole = _tokenizer(kind).decode(ids)
    pieces = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 5)]
    stop = data.draw(st.lists(st.sampled_from([*pieces, "zz", "is P"]), min_size=1, max_size=3))
    include = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    options: dict[str, Any] = {"stop": stop, "include_stop_str_in_output": include}

    each = IncrementalDetokenizer(_tokenizer(kind), **options)
    want = "".join(_run(each, ids, range(len(ids))))
    grouped = IncrementalDetokenizer(_tokenizer(kind), **options)
    assert "".join(_run(grouped, ids, cuts)) == want
    assert (grouped.stopped, grouped.num_tokens) == (each.stopped, each.num_tokens)

    assert whole.startswith(want)
    if each.stopped is None:
        assert want == whole and each.num_tokens == len(ids)
        stable = whole.rstrip(REPLACEMENT)  # bytes that never became a character come at the end
        assert not any(string in stable for string in stop)
    else:
        body = want[: -len(each.stopped)] if include else want
        assert want.endswith(each.stopped) or not include
        assert whole.startswith(body + each.stopped)
        assert not any(string in body for string in stop)
        shorter = _tokenizer(kind).decode(ids[: each.num_tokens - 1])
        assert not any(string in shorter.rstrip(REPLACEMENT) for string in stop)


@settings(max_examples=100, deadline=None)
@given(text=st.text("🚀é你a ", max_size=20))
def test_no_broken_characters_are_returned(text: str) -> None:
    ids = [i for c in text.encode() for i in _byte_ids(c)]
    detokenizer = IncrementalDetokenizer(_tokenizer("byte_level"))
    parts = [detokenizer.push([i]) for i in ids]
    assert all(REPLACEMENT not in part for part in parts)
    assert "".join(parts) == text and detokenizer.flush() == ""


@cache
def _byte_table() -> dict[bytes, int]:
    tokenizer = _tokenizer("byte_level")
    return {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}


def _byte_ids(byte: int) -> list[int]:
    return [_byte_table()[bytes([byte])]]


def _ids(text: str) -> list[int]:
    """Returns one token id for each byte."""
    return [_byte_table()[bytes([b])] for b in text.encode()]


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(_tokenizer("byte_level"), stop=["STOP"])
    assert [detokenizer.push([i]) for i in _ids("aSTxST")] == ["a", "", "", "STx", "", ""]
    assert detokenizer.flush() == "ST"
    detokenizer = IncrementalDetokenizer(_tokenizer("byte_level"), stop=["STOP"])
    assert "".join(detokenizer.push([i]) for i in _ids("bSSTOPmore")) == "bS"
    assert detokenizer.stopped == "STOP" and detokenizer.num_tokens == 6
    assert detokenizer.push(_ids("x")) == "" and detokenizer.flush() == ""


def test_the_earliest_stop_string_wins() -> None:
    for stop in (["b", "ab"], ["ab", "b"]):
        detokenizer = IncrementalDetokenizer(_tokenizer("byte_level"), stop=stop)
        assert detokenizer.push(_ids("xxab")) + detokenizer.flush() == "xx"
        assert detokenizer.stopped == "ab"


def test_stop_string_inside_one_token_cuts_it() -> None:
    (the,) = [i for i in range(384) if _tokenizer("byte_level").token_bytes(i) == b" is"][:1]
    for include, want in ((False, "a "), (True, "a i")):
        detokenizer = IncrementalDetokenizer(
            _tokenizer("byte_level"), stop=["i"], include_stop_str_in_output=include
        )
        assert detokenizer.push([*_ids("a"), the]) == want
        assert detokenizer.flush() == "" and detokenizer.num_tokens == 2


@pytest.mark.parametrize(
    ("min_tokens", "want"), [(0, ""), (2, ""), (3, "abc"), (5, "abc"), (6, "abcabc")]
)
def test_stop_strings_complete_by_min_tokens_do_not_count(min_tokens: int, want: str) -> None:
    detokenizer = IncrementalDetokenizer(
        _tokenizer("byte_level"), stop=["abc"], min_tokens=min_tokens
    )
    text = "".join(detokenizer.push([i]) for i in _ids("abcabc"))
    assert text + detokenizer.flush() == want


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    """SentencePiece: ▁Paris begins a text as "Paris" and goes on with " Paris"."""
    tokenizer = _tokenizer("sentencepiece")
    ids = tokenizer.encode("Paris", add_special_tokens=False)
    prompt = tokenizer.encode("It is")
    assert _text("sentencepiece", ids) == "Paris"
    assert _text("sentencepiece", ids, prompt_token_ids=[1]) == "Paris"
    assert _text("sentencepiece", ids, prompt_token_ids=prompt) == " Paris"
    assert _text("sentencepiece", [1, *ids], skip_special_tokens=False) == "<s> Paris"


def test_a_character_broken_off_by_the_prompt_is_completed() -> None:
    rocket = _ids("🚀")
    assert _text("byte_level", rocket[2:], prompt_token_ids=[*_ids("a"), *rocket[:2]]) == "🚀"


def test_incomplete_bytes_at_the_end_read_as_replacement() -> None:
    detokenizer = IncrementalDetokenizer(_tokenizer("byte_level"))
    assert detokenizer.push(_ids("a") + _ids("🚀")[:3]) == "a"
    assert detokenizer.flush() == REPLACEMENT


def test_a_step_needs_no_more_memory_as_the_text_grows() -> None:
    """Searching or decoding the text so far would need it: 16,000 tokens are some 60 KB."""
    detokenizer = IncrementalDetokenizer(_tokenizer("byte_level"), stop=["never met", "nor this"])
    chunk = _ids("Paris is it. ") * 200
    num_chars = sum(len(detokenizer.push((token_id,))) for token_id in chunk)
    for _ in range(4):
        for token_id in chunk:
            num_chars += len(detokenizer.push((token_id,)))
    assert num_chars > 10_000  # one copy of it would be seen below
    tracemalloc.start()
    for _ in range(100):  # other threads of this process may allocate meanwhile: one round counts
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        for token_id in chunk:
            num_chars += len(detokenizer.push((token_id,)))
        after, peak = tracemalloc.get_traced_memory()
        if after - before < 2048 and peak - before < 4096:
            break
    else:
        pytest.fail(f"{num_chars} characters: kept {after - before}, peak {peak - before} bytes")
    tracemalloc.stop()
