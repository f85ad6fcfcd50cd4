"""An emptied prefix cache: later requests compute everything, running ones go on unharmed.

The fake worker checks every row of KV that a step reads against the history it should hold.
"""

import random

import pytest

from helpers.scheduling.scheduler_harness import Harness

PROMPT = [i % 7 for i in range(24)]


def cached(harness: Harness, request_id: int) -> int:
    """Serves PROMPT. Returns how many of its tokens came from the cache."""
    harness.add(request_id, PROMPT, max_tokens=2)
    harness.run()
    return harness.expected[request_id].num_cached_tokens


def test_nothing_is_shared_with_what_came_before() -> None:
    harness = Harness()
    assert [cached(harness, i) for i in range(2)] == [0, 20]
    harness.scheduler.memory.kv.reset()
    harness.verify()
    assert harness.scheduler.stats()["pages_prefix"] == 0
    assert [cached(harness, i) for i in range(2, 4)] == [0, 20]


@pytest.mark.parametrize("seed", range(6))
def test_running_requests_go_on(seed: int) -> None:
    rng = random.Random(seed)
    harness = Harness(num_pages=40, max_steps_in_flight=2)
    for request_id in range(30):
        prompt = [*PROMPT[: rng.randint(1, 20)], request_id % 3]
        harness.add(request_id, prompt, max_tokens=rng.randint(1, 20))
        for _ in range(rng.randint(0, 3)):
            harness.turn()
        if rng.random() < 0.4:
            harness.scheduler.memory.kv.reset()
            harness.verify()
    harness.run()
