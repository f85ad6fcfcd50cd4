"""Bad words in a whole engine: overlapped steps, preemption, cut and resumed answers, n > 1."""

from array import array
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.worker.worker import Worker
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AddRequest
from loraplex.scheduler.worker_protocol import SamplingSpec, int_array

from helpers.models.hf_models import make_hf_model
from helpers.running.bare_engine import BareEngine, token_ids
from helpers.running.step_driver import GREEDY

NUM_TOKENS = 24
PROMPTS = ([5, 9, 200, 31, 5, 9, 77], [8], [100, 3, 100, 3, 100])
Words = list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    base = tmp_path_factory.mktemp("bad_words") / "base"
    model = make_hf_model("llama", base, seed=3, num_hidden_layers=2)
    model.name_or_path = str(base)
    return model


def make_engine(model: PreTrainedModel, **memory: Any) -> BareEngine:
    config = EngineConfig(
        model=ModelConfig(
            model=model.name_or_path, device="cpu", dtype="float32", skip_tokenizer_init=True
        ),
        memory=MemoryConfig(block_tokens=4, **memory),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64),
    )
    return BareEngine(config, Worker)


def greedy(model: PreTrainedModel, prompt: list[int], words: Words) -> list[int]:
    """Answers token by token without a cache; a word's last token is skipped after its others."""
    answer: list[int] = []
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, -1]
        for word in words:
            before = word[:-1]
            if len(before) <= len(answer) and answer[len(answer) - len(before) :] == before:
                logits[word[-1]] = -torch.inf
        answer.append(int(logits.argmax()))
    return answer


def make_cases(model: PreTrainedModel) -> list[tuple[list[int], Words]]:
    """Returns prompts with words that their own answers would contain, of one to four tokens."""
    cases = []
    for prompt in PROMPTS:
        words: Words = []
        cases.append((prompt, []))
        for round_ in range(3):
            answer = greedy(model, prompt, words)
            at = 2 + 5 * round_
            words = [*words, answer[at : at + 2], answer[at + 3 : at + 4 + round_], [answer[0]] * 2]
            cases.append((prompt, words))
    return cases


def request(request_id: int, prompt: list[int], words: Words, **changes: Any) -> AddRequest:
    fields = {key: changes.pop(key) for key in list(changes) if key == "generated_token_ids"}
    spec = SamplingSpec(
        **GREEDY
        | {
            "max_tokens": NUM_TOKENS,
            "bad_word_ids": int_array(list(chain.from_iterable(words))),
            "bad_word_lengths": int_array([len(word) for word in words]),
        }
        | changes
    )
    return AddRequest(request_id, array("i", prompt), spec, **fields)


def contains(answer: list[int], word: list[int]) -> bool:
    return any(answer[i : i + len(word)] == word for i in range(len(answer)))


def test_greedy_answers_equal_the_oracles(model: PreTrainedModel) -> None:
    cases = make_cases(model)
    expected = [greedy(model, *case) for case in cases]
    assert len({tuple(answer) for answer in expected}) == len(cases)  # every list changes something
    requests = [request(i, *case) for i, case in enumerate(cases)]
    outputs = make_engine(model, num_pages=300).serve(requests)
    assert [token_ids(outputs[i]).tolist() for i in range(len(cases))] == expected
    small = make_engine(model, num_pages=30, enable_prefix_caching=False)
    outputs = small.serve(requests)
    assert small.scheduler.stats()["num_preemptions"] > 0
    assert [token_ids(outputs[i]).tolist() for i in range(len(cases))] == expected


def test_drawn_answers_hold_no_word_and_resume_equal(model: PreTrainedModel) -> None:
    engine = make_engine(model, num_pages=300)
    drawn = {"temperature": 0.9, "seed": 11}
    free = token_ids(engine.serve([request(0, PROMPTS[0], [], **drawn)])[0]).tolist()
    words = [free[3:4], free[5:7], free[8:11]]
    seeds = range(11, 15)  # as the n answers of one request have
    requests = [request(i, PROMPTS[0], words, temperature=0.9, seed=i) for i in seeds]
    whole = {i: token_ids(o).tolist() for i, o in engine.serve(requests).items()}
    assert whole[11] != free
    assert not any(contains(answer, word) for answer in whole.values() for word in words)
    for cut in (1, 4, 6, NUM_TOKENS - 1):
        resumed = [
            request(i, PROMPTS[0], words, temperature=0.9, seed=i,
                    generated_token_ids=int_array(whole[i][:cut]))
            for i in seeds
        ]  # fmt: skip
        for i, outputs in engine.serve(resumed).items():
            assert token_ids(outputs).tolist() == whole[i][cut:]
