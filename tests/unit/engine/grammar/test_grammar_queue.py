"""Grammars are compiled off the scheduler's thread; each request's masks follow its tokens."""

import json
import random
import re
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.frontend.structured.structured_outputs import StructuredOutputsParams
from loraplex.engine.grammar.request_queue import GrammarQueue
from loraplex.engine.grammar.vocabulary import Vocabulary
from loraplex.engine.grammar.vocabulary_cache import VocabularyCache
from loraplex.engine.tokenizer.loading import load_tokenizer
from loraplex.engine.tokenizer.tokenizer import Tokenizer
from loraplex.scheduler.request import Request

from helpers.fakes.fake_model import sampling_spec
from helpers.models.hf_models import make_tokenizer

STOP = 2
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
HOSTILE = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(60)]}


class Engine:
    """The queue, and the loop that takes from it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._woken = threading.Event()
        self._num_requests = 0
        vocabularies = VocabularyCache(
            lambda own: Vocabulary(tokenizer, own.num_tokens if own else 400)
        )
        self.queue = GrammarQueue(vocabularies, self._woken.set)

    def add(
        self,
        min_tokens: int = 0,
        stop_ids: tuple[int, ...] = (STOP,),
        client: bytes = b"",
        generated: tuple[int, ...] = (),
        **form: Any,
    ) -> Request:
        self._num_requests += 1
        request = Request(
            request_id=self._num_requests,
            prompt_token_ids=array("i", [5]),
            sampling=sampling_spec(stop_token_ids=array("i", stop_ids)),
            client=client,
            generated_token_ids=array("i", generated),
            grammar=StructuredOutputsParams(**form).to_grammar(min_tokens),
        )
        self.queue.add(request)
        return request

    def take(self) -> tuple[Request, str]:
        while not (taken := self.queue.take_compiled()):
            assert self._woken.wait(60)
            self._woken.clear()
        (one,) = taken
        return one

    def compile(self, **form: Any) -> Request:
        request = self.add(**form)
        taken, error = self.take()
        assert (taken, error) == (request, "")
        return request

    def error_of(self, **form: Any) -> str:
        self.add(**form)
        return self.take()[1]

    def allowed(self, request: Request) -> list[int]:
        self.queue.wait_for_masks(60)
        assert request.constraint is not None and request.constraint.mask is not None
        mask = request.constraint.mask
        return [i for i in range(32 * len(mask)) if mask[i // 32] >> i % 32 & 1]

    def walk(self, request: Request, seed: int, max_tokens: int = 400) -> str | None:
        """Take random allowed tokens to the end; None if there is none within max_tokens."""
        rng, taken = random.Random(seed), array("i")
        for _ in range(max_tokens):
            token_id = rng.choice(self.allowed(request))
            if token_id in request.stop_ids:
                return self.tokenizer.decode(taken)
            taken.append(token_id)
            assert request.constraint is not None
            request.constraint.advance(array("i", [token_id]), array("i"))
        return None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    made = Engine(load_tokenizer(path))
    yield made
    made.queue.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_walks_end_in_valid_texts(engine: Engine, seed: int) -> None:
    text = engine.walk(engine.compile(json=SCHEMA, disable_any_whitespace=True), seed)
    assert text is None or set(json.loads(text)) == {"a", "b"}
    text = engine.walk(engine.compile(regex=r"^[a-z]{2,5}-\d{3}é$"), seed)
    assert text is not None and re.fullmatch(r"[a-z]{2,5}-\d{3}é", text)
    choice = ["yes", "no", 'say "\\n" /now/\n', "yesterday", "ünï"]
    assert engine.walk(engine.compile(choice=choice), seed) in choice
    text = engine.walk(engine.compile(grammar='root ::= "a" [0-9] ("," [0-9])? "z"'), seed)
    assert text is not None and re.fullmatch(r"a\d(,\d)?z", text)
    assert engine.walk(engine.compile(grammar='start: "x" /[0-9]{2}/'), seed) is not None


def test_stop_ids_are_allowed_where_the_text_may_end_and_nowhere_else(engine: Engine) -> None:
    a = engine.tokenizer.encode("a", add_special_tokens=False)[-1]
    request = engine.compile(regex="a{1,2}", stop_ids=(STOP, 7))
    assert not {STOP, 7} & set(engine.allowed(request))
    assert request.constraint is not None
    request.constraint.advance(array("i", [a]), array("i"))
    assert {STOP, 7, a} <= set(engine.allowed(request))
    request.constraint.advance(array("i", [a]), array("i"))
    assert engine.allowed(request) == [STOP, 7]


def test_min_tokens_keeps_stop_ids_away_until_only_they_are_left(engine: Engine) -> None:
    a = engine.tokenizer.encode("a", add_special_tokens=False)[-1]
    request = engine.compile(regex="a{1,3}", min_tokens=2)
    assert request.constraint is not None
    request.constraint.advance(array("i", [a]), array("i"))
    assert STOP not in engine.allowed(request)
    request.constraint.advance(array("i", [a]), array("i"))
    assert STOP in engine.allowed(request)
    ended = engine.compile(regex="a", min_tokens=9)
    assert ended.constraint is not None
    ended.constraint.advance(array("i", [a]), array("i"))
    assert engine.allowed(ended) == [STOP]


def test_an_answer_that_another_engine_has_begun_goes_on_in_its_grammar(engine: Engine) -> None:
    a, b = (engine.tokenizer.encode(text, add_special_tokens=False)[-1] for text in "ab")
    whole = engine.compile(regex="a{2}b{2}", min_tokens=3)
    taken: tuple[int, ...] = ()
    for token_id in (a, a, b):
        assert whole.constraint is not None
        whole.constraint.advance(array("i", [token_id]), array("i"))
        taken += (token_id,)
        resumed = engine.compile(regex="a{2}b{2}", min_tokens=3, generated=taken)
        assert engine.allowed(resumed) == engine.allowed(whole)
    assert "structured_outputs" in engine.error_of(regex="a{2}b{2}", generated=(b,))


def test_equal_grammars_share_no_state(engine: Engine) -> None:
    first, second = engine.compile(choice=["ab", "cd"]), engine.compile(choice=["ab", "cd"])
    before = engine.allowed(second)
    assert first.constraint is not None
    first.constraint.advance(array("i", [before[0]]), array("i"))
    assert engine.allowed(second) == before != engine.allowed(first)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"regex": "(a|b"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "foo"}}, "Invalid type: foo"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no text fits"),
        ({"json": {"type": "object", "if": {}}}, 'Unimplemented keys: ["if"]'),
        ({"grammar": "start: missing"}, 'unknown name: "missing"'),
        ({"grammar": "root ::= ("}, "cannot be"),
        ({"json": HOSTILE}, "more than 2 s to compile"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_says_why(
    engine: Engine, form: dict[str, Any], text: str
) -> None:
    error = engine.error_of(**form)
    assert error.startswith("structured_outputs: ")
    assert text in error


def test_slow_grammars_delay_no_other_client(engine: Engine) -> None:
    slow = [engine.add(json={**HOSTILE, "title": str(i)}, client=b"slow") for i in range(5)]
    quick = engine.add(choice=["quick"])
    assert engine.take() == (quick, "")
    assert [engine.take()[0] for _ in slow] == slow


def test_an_aborted_request_does_not_come_back(engine: Engine) -> None:
    request = engine.add(choice=["gone"])
    engine.queue.abort(request.request_id, request.frontend)
    kept = engine.compile(choice=["kept"])
    assert kept is not request
