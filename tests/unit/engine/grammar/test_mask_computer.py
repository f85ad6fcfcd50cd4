"""Masks of running requests come before first masks, and a broken batch ends no other."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from loraplex.engine.grammar.mask_computer import MaskComputer, MaskTask
from loraplex.engine.grammar.matcher import GrammarMatcher
from loraplex.engine.grammar.vocabulary import Vocabulary
from loraplex.engine.tokenizer.loading import load_tokenizer

from helpers.models.hf_models import make_tokenizer


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    tokenizer = load_tokenizer(path)
    return Vocabulary(tokenizer, tokenizer.vocab_size)


@pytest.fixture
def computer() -> Iterator[MaskComputer]:
    made = MaskComputer(lambda: None)
    yield made
    made.close()


def make_matcher(vocabulary: Vocabulary, errors: list[str] | None = None) -> GrammarMatcher:
    return GrammarMatcher(
        LLMatcher(vocabulary.library, LLMatcher.grammar_from_regex("[a-z]+")),
        vocabulary,
        stop_ids=[2],
        min_tokens=0,
        on_advance=lambda matcher, token_ids, drafts: None,
        on_error=(errors if errors is not None else []).append,
    )


def test_running_requests_come_before_new_ones(
    vocabulary: Vocabulary, computer: MaskComputer
) -> None:
    order: list[str] = []
    is_blocked, may_go_on, ended = (threading.Event() for _ in range(3))

    def block() -> None:
        is_blocked.set()
        may_go_on.wait(60)

    computer.add_first(MaskTask(make_matcher(vocabulary), (), done=block))
    assert is_blocked.wait(60)
    new, running = (make_matcher(vocabulary) for _ in range(2))
    computer.add_first(MaskTask(new, (), done=lambda: (order.append("new"), ended.set())))
    computer.add_next(MaskTask(running, (), done=partial(order.append, "running")))
    computer.wait(0.0)  # not over, but the time is
    assert running.mask is None
    may_go_on.set()
    computer.wait(60)
    assert running.mask is not None
    assert ended.wait(60)
    assert order == ["running", "new"] and new.mask == running.mask


class Broken:
    """Stands for a matcher that the library fails on."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.on_error = self.errors.append

    def consume(self, token_ids: object) -> bool:
        raise RuntimeError("the library broke")


def test_a_batch_that_breaks_fails_and_the_next_one_is_computed(
    vocabulary: Vocabulary, computer: MaskComputer
) -> None:
    broken: Any = Broken()
    computer.add_next(MaskTask(broken, (7,)))
    computer.wait(60)
    assert broken.errors == ["the mask cannot be computed: the library broke"]
    whole = make_matcher(vocabulary)
    computer.add_next(MaskTask(whole, ()))
    computer.wait(60)
    assert whole.mask is not None


def test_a_token_that_the_grammar_excludes_fails_its_request_alone(
    vocabulary: Vocabulary, computer: MaskComputer
) -> None:
    errors: list[str] = []
    wrong, right = make_matcher(vocabulary, errors), make_matcher(vocabulary)
    (a,) = (i for i in range(300) if vocabulary.token_bytes(i) == b"a")
    (digit,) = (i for i in range(300) if vocabulary.token_bytes(i) == b"7")
    computer.add_next(MaskTask(wrong, (digit,)))
    computer.add_next(MaskTask(right, (a,)))
    computer.wait(60)
    assert errors and wrong.mask is None and right.mask is not None
