"""The scheduler tells by which vocabulary an adapter's request must be encoded."""

from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import ModelConfig
from loraplex.engine.frontend.inputs import TextCodec, load_text_codec
from loraplex.engine.ipc.messages.frontend import AbortRequests
from loraplex.scheduler.frontend_protocol import AdapterVocabulary, AddRequest

from helpers.fakes.frontend_harness import A, FrontendHarness
from helpers.models.hf_models import make_tokenizer
from helpers.vocabularies.extended_tokenizers import extend_tokenizer

TEXT = "the <tool> capital"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("told")
    make_tokenizer(root / "base")
    extend_tokenizer(root / "base", root / "own", ["<tool>", "<|end|>"])
    return root


@pytest.fixture
def harness(folders: Path) -> FrontendHarness:
    codec = load_text_codec(ModelConfig(model=str(folders / "base")))
    return FrontendHarness(codec, model=ModelConfig(model=str(folders / "base")))


def vocabulary(folders: Path, key: str = "k", num_tokens: int = 386) -> AdapterVocabulary:
    return AdapterVocabulary(key, str(folders / "own"), num_tokens)


def refuse(harness: FrontendHarness, added: AddRequest, told: AdapterVocabulary) -> None:
    values: dict[str, Any] = {"finish_reason": "error", "error_code": "adapter", "error": "other"}
    harness.output(added.request_id, [], **values, vocabulary=told)


def load(harness: FrontendHarness, added: AddRequest, told: AdapterVocabulary) -> AddRequest:
    """Has a request refused, and waits until the vocabulary is loaded. Returns the new request."""
    refuse(harness, added, told)
    harness.run_pooled()
    (again,) = harness.take_sent(AddRequest)
    return again


def test_a_request_is_encoded_again_and_the_next_one_at_once(
    harness: FrontendHarness, folders: Path
) -> None:
    harness.ask(A, prompt=TEXT, adapter="x")
    (first,) = harness.take_sent(AddRequest)
    assert first.vocabulary == "" and max(first.prompt_token_ids) < 384
    again = load(harness, first, vocabulary(folders))
    assert again.vocabulary == "k" and 384 in again.prompt_token_ids
    harness.output(again.request_id, [384], finish_reason="length")
    (reply,) = harness.take()
    assert reply["outputs"][0]["text"] == "<tool>"
    assert harness.stats["prompt_bytes"] == 0
    harness.ask(A, prompt=TEXT, adapter="x", request_id="s")
    (second,) = harness.take_sent(AddRequest)
    assert second.vocabulary == "k" and second.prompt_token_ids == again.prompt_token_ids
    harness.ask(A, prompt=TEXT, request_id="base")
    (base,) = harness.take_sent(AddRequest)
    assert base.vocabulary == "" and base.prompt_token_ids == first.prompt_token_ids


def test_a_replaced_adapter_goes_back_to_the_bases_tokens(
    harness: FrontendHarness, folders: Path
) -> None:
    harness.ask(A, prompt=TEXT, adapter="x")
    (first,) = harness.take_sent(AddRequest)
    again = load(harness, first, vocabulary(folders))
    refuse(harness, again, AdapterVocabulary())
    (last,) = harness.take_sent(AddRequest)
    assert last.vocabulary == "" and last.prompt_token_ids == first.prompt_token_ids


@pytest.mark.parametrize(
    "values",
    [
        {"prompt_token_ids": [5, 385]},
        {"prompt": TEXT, "sampling_params": {"stop_token_ids": [385], "n": 2}},
    ],
)
def test_ids_that_the_base_lacks_are_a_question(
    harness: FrontendHarness, values: dict[str, Any]
) -> None:
    harness.ask(A, adapter="x", **values)
    (question,) = harness.take_sent(AddRequest)
    assert question.vocabulary == "?"
    refuse(harness, question, AdapterVocabulary("k", "", 386))
    harness.run_pooled()
    added = harness.take_sent(AddRequest)
    assert [request.vocabulary for request in added] == ["k"] * len(added)
    assert len(added) == values.get("sampling_params", {}).get("n", 1)


def test_ids_that_the_adapter_lacks(harness: FrontendHarness) -> None:
    for told, size in ((AdapterVocabulary("k", "", 386), 386), (AdapterVocabulary(), 384)):
        harness.ask(A, prompt_token_ids=[5, 386], adapter="x")
        (question,) = harness.take_sent(AddRequest)
        assert question.vocabulary == "?"
        refuse(harness, question, told)
        if not harness.replies:
            harness.run_pooled()
        (error,) = harness.take()
        assert error["message"] == f"token id 386 is outside the vocabulary of {size}"
    assert harness.stats["prompt_bytes"] == 0


def test_all_answers_of_a_request_are_sent_again(harness: FrontendHarness, folders: Path) -> None:
    harness.ask(A, prompt=TEXT, adapter="x", sampling_params={"n": 3})
    added = harness.take_sent(AddRequest)
    refuse(harness, added[0], vocabulary(folders))
    (abort,) = harness.take_sent(AbortRequests)
    assert set(abort.request_ids) >= {request.request_id for request in added[1:]}
    refuse(harness, added[1], vocabulary(folders))  # it was aborted here
    harness.run_pooled()
    assert len(harness.take_sent(AddRequest)) == 3
    assert not harness.replies


def test_a_request_that_has_begun_is_not_sent_again(
    harness: FrontendHarness, folders: Path
) -> None:
    harness.ask(A, prompt=TEXT, adapter="x", stream=True, sampling_params={"n": 2})
    first, second = harness.take_sent(AddRequest)
    harness.output(first.request_id, [7])
    refuse(harness, second, vocabulary(folders))
    assert harness.take()[-1]["code"] == "adapter"
    assert harness.stats["prompt_bytes"] == 0


def test_an_adapter_that_is_replaced_again_and_again(
    harness: FrontendHarness, folders: Path
) -> None:
    harness.ask(A, prompt=TEXT, adapter="x")
    (added,) = harness.take_sent(AddRequest)
    for number in range(3):
        added = load(harness, added, vocabulary(folders, f"k{number}"))
    refuse(harness, added, vocabulary(folders, "k3"))
    (error,) = harness.take()
    assert (error["code"], error["message"]) == ("adapter", "other")


def test_a_cancelled_request_is_not_sent_again(harness: FrontendHarness, folders: Path) -> None:
    harness.ask(A, prompt=TEXT, adapter="x")
    (added,) = harness.take_sent(AddRequest)
    refuse(harness, added, vocabulary(folders))
    harness.ask(A, "cancel")
    (reply,) = harness.take()
    assert reply["outputs"][0]["finish_reason"] == "abort"
    harness.run_pooled()
    assert not harness.take_sent(AddRequest)


def test_a_tokenizer_without_rows_is_refused(harness: FrontendHarness, folders: Path) -> None:
    harness.ask(A, prompt=TEXT, adapter="x")
    (added,) = harness.take_sent(AddRequest)
    refuse(harness, added, vocabulary(folders, num_tokens=385))
    harness.run_pooled()
    (error,) = harness.take()
    assert error["code"] == "adapter"
    assert "adapter 'x': the tokenizer has the token '<|end|>' with id 385" in error["message"]


def test_the_prompts_text_is_counted_until_the_first_token(
    codec: TextCodec, harness: FrontendHarness
) -> None:
    sizes = []
    for number, values in enumerate(({}, {"adapter": "x"})):
        harness.ask(A, prompt=TEXT, request_id=str(number), stream=True, **values)
        (added,) = harness.take_sent(AddRequest)
        before = harness.stats["prompt_bytes"]
        harness.output(added.request_id, [7])
        sizes.append((before, harness.stats["prompt_bytes"]))
        harness.ask(A, "cancel", request_id=str(number))
    (base, base_after), (own, own_after) = sizes
    assert base == base_after == own_after and own == base + len(TEXT)
