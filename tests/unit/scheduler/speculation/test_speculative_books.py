"""Random traffic with drafts that are right by chance: answers, pages and counts stay right.

The harness checks the scheduler's integrity after every operation, and every answer against the
oracle. The fake worker checks every page that a step reads or writes.
"""

import random
from array import array
from typing import Any

import pytest

from helpers.scheduling.scheduler_harness import Harness


class GuessingDrafter:
    """Drafts the oracle's answer, each token of it wrong with some probability."""

    def __init__(self, engine: Harness, name: Any, rng: random.Random, error_rate: float) -> None:
        self._engine, self._name = engine, name
        self._rng, self._error_rate = rng, error_rate

    def draft(self, token_ids: "array[int]") -> "array[int]":
        expectation = self._engine.expected[self._name]
        answer, _, _ = self._engine.oracle(expectation)
        known = len(token_ids) - len(expectation.prompt)
        drafts = answer[known : known + self._rng.randint(0, 6)]
        for place in range(len(drafts)):
            if self._rng.random() < self._error_rate:
                drafts[place] = self._rng.randrange(50)
        stop_ids = set(expectation.sampling.stop_token_ids)
        stops = [place for place, token_id in enumerate(drafts) if token_id in stop_ids]
        return array("i", drafts[: min(stops, default=len(drafts))])


class Masks:
    """Allows all; the masks say which token they are for."""

    def __init__(self) -> None:
        self.mask: array[int] | None = array("i", [0])
        self.draft_masks: list[array[int]] = []
        self.num_taken = 0

    def advance(self, token_ids: "array[int]", drafts: "array[int]") -> None:
        self.num_taken += len(token_ids)
        self.mask = array("i", [self.num_taken])
        # The grammar forbids the third draft.
        self.draft_masks = [array("i", [self.num_taken + 1 + k]) for k in range(len(drafts[:2]))]


def random_engine(rng: random.Random) -> Harness:
    max_num_seqs = rng.randint(1, 6)
    config = f'{{"method": "ngram", "num_speculative_tokens": {rng.choice([2, 5, 9])}}}'
    return Harness(
        policy={"speculative_config": config, "policy": rng.choice(["fcfs", "vtc"])},
        num_pages=rng.randint(14, 40),
        block_tokens=rng.choice([1, 2, 4]),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 60]),
        max_steps_in_flight=rng.randint(1, 3),
        max_model_len=rng.choice([13, 24]),
        enable_prefix_caching=rng.random() < 0.8,
    )


def add(engine: Harness, rng: random.Random, name: int) -> None:
    code = engine.try_add(
        name,
        [rng.randrange(2) for _ in range(rng.randint(1, 8))],
        max_tokens=rng.randint(1, 20),
        min_tokens=rng.choice([0, 0, 3]),
        stop_token_ids=rng.choice([(), (3, 4, 5)]),
        num_logprobs=rng.choice([-1, -1, 0]),
        num_prompt_logprobs=rng.choice([-1, -1, 0]),
        num_resumed=rng.choice([0, 0, 2]),
    )
    if code:
        return
    request: Any = engine.requests[name]
    request.drafter = GuessingDrafter(engine, name, rng, rng.choice([0.0, 0.1, 0.5, 1.0]))
    if rng.random() < 0.2:
        request.constraint = Masks()


def run(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    engine = random_engine(rng)
    for name in range(14):
        add(engine, rng, name)
        for _ in range(rng.randrange(4)):
            engine.turn()
        if rng.random() < 0.1:
            engine.abort(rng.choice(list(engine.requests)))
    engine.run()
    return engine.scheduler.stats()


@pytest.mark.parametrize("seed", range(12))
def test_answers_are_those_without_drafts(seed: int) -> None:
    run(seed)


def test_the_traffic_provokes_what_it_should() -> None:
    totals: dict[str, int] = {}
    for seed in range(100, 112):
        for name, count in run(seed).items():
            if isinstance(count, int):
                totals[name] = totals.get(name, 0) + count
    assert totals["num_drafted_tokens"] > totals["num_accepted_tokens"] > 100
    assert totals["num_preemptions"] > 0 and totals["prefix_hit_tokens"] > 0
