"""Bad words: the forbidden next tokens of random answers, against a plain loop."""

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.torch_ops import TorchFused
from loraplex.engine.worker.sampler import SamplingBatch, sample
from loraplex.engine.worker.sampling_states import SamplingStates
from loraplex.scheduler.worker_protocol import NOT_FINITE, SamplingSpec, int_array

from helpers.fakes.fake_model import sampling_spec

VOCAB = 8
FUSED = TorchFused(FusedSpec(torch.float32, torch.device("cpu"), 64))


def spec_of(words: list[list[int]], **changes: Any) -> SamplingSpec:
    return replace(
        sampling_spec(),
        temperature=0.0,
        bad_word_ids=int_array(list(chain.from_iterable(words))),
        bad_word_lengths=int_array([len(word) for word in words]),
        **changes,
    )


def forbidden(words: list[list[int]], answer: list[int]) -> set[int]:
    return {word[-1] for word in words if answer[len(answer) - len(word) + 1 :] == word[:-1]
            and len(answer) >= len(word) - 1}  # fmt: skip


def draw(rows: list[tuple[SamplingSpec, list[int], list[int]]], logits: torch.Tensor) -> list[int]:
    """Draws the next token of each (spec, prompt, answer), in slots of their own."""
    states = SamplingStates(len(rows) + 1, VOCAB)
    token_ids = torch.full((len(rows) + 1, 40), 3, dtype=torch.int32)  # stale ids everywhere
    slots = list(range(len(rows), 0, -1))
    for slot, (spec, prompt, answer) in zip(slots, rows, strict=True):
        states.set(slot, spec, len(prompt))
        token_ids[slot, : len(prompt + answer)] = torch.tensor(prompt + answer)
    positions = [len(prompt) + len(answer) for _, prompt, answer in rows]
    arrays = states.collect(np.array(slots, dtype=np.int32), np.array(positions, dtype=np.int32))
    batch = SamplingBatch(**{name: torch.from_numpy(value) for name, value in arrays.items()})
    return sample(logits, batch, token_ids, max(positions), fused=FUSED).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_random_answers_against_a_loop(seed: int) -> None:
    rng = random.Random(seed)
    rows, lists = [], []
    for _ in range(rng.randint(1, 6)):
        words = [
            [rng.randrange(3) for _ in range(rng.choice((1, 2, 2, 3, 4)))]
            for _ in range(rng.randint(0, 6))
        ]
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 5))]
        answer = [rng.randrange(3) for _ in range(rng.randint(0, 6))]
        rows.append((spec_of(words), prompt, answer))
        lists.append((words, answer))
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[:, :3] += 9.0  # the words' tokens are the likely ones
    expected = []
    for row, (words, answer) in zip(logits.tolist(), lists, strict=True):
        allowed = [i for i in range(VOCAB) if i not in forbidden(words, answer)]
        expected.append(max(allowed, key=row.__getitem__))
    assert draw(rows, logits) == expected


def test_the_prompt_takes_no_part() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 5.0
    word = spec_of([[1, 2]])
    assert draw([(word, [4, 1], [])], logits) == [2]
    assert draw([(word, [4], [1])], logits) != [2]
    assert draw([(spec_of([[4, 1, 2]]), [4], [1])], logits) == [2]


def test_words_with_one_last_token_forbid_it_if_any_matches() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 5.0
    for words in ([[1, 2], [0, 2]], [[0, 2], [1, 2]], [[1, 2], [1, 2]]):
        assert draw([(spec_of(words), [4], [1])], logits) != [2]
        assert draw([(spec_of(words), [4], [3])], logits) == [2]


def test_a_slot_forgets_its_words() -> None:
    states = SamplingStates(1, VOCAB)
    slot, position = np.zeros(1, dtype=np.int32), np.array([3], dtype=np.int32)
    states.set(0, spec_of([[1], [2, 3]]), 2)
    assert {"word_rows", "forbidden_rows"} <= set(states.collect(slot, position))
    states.clear(0)
    assert set(states.collect(slot, position)) == {"temperature", "keys"}
    states.set(0, spec_of([[1], [2, 3]]), 2)
    states.set(0, spec_of([]), 2)
    assert set(states.collect(slot, position)) == {"temperature", "keys"}


def test_a_row_without_a_token_and_a_broken_logit_have_none() -> None:
    every = [[i] for i in range(VOCAB - 1)] + [[1, VOCAB - 1]]
    assert draw([(spec_of(every), [4], [1])], torch.zeros(1, VOCAB)) == [NOT_FINITE]
    broken = torch.zeros(1, VOCAB)
    broken[0, 2] = torch.inf
    assert draw([(spec_of([[1, 2]]), [4], [1])], broken) == [NOT_FINITE]
