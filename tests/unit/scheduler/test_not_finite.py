"""Requests whose logits are not finite: they end with an error, and nothing else notices."""

import random
from typing import Any

import pytest

from helpers.scheduling.scheduler_harness import Harness

PROMPT = [i % 40 for i in range(21)]

SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 40))]


def make_harness(**options: Any) -> Harness:
    harness = Harness(**{"max_steps_in_flight": 3} | options)
    harness.register("bad")
    harness.register("good")
    return harness


def pages_in_prefix_cache(harness: Harness) -> int:
    return int(harness.scheduler.stats()["pages_prefix"])


def test_error_names_adapter_and_position_and_keeps_the_answer_so_far() -> None:
    harness = make_harness()
    harness.worker.broken["bad"] = len(PROMPT) + 3
    harness.add("lost", PROMPT, adapter="bad", max_tokens=20)
    harness.add("other", PROMPT, adapter="good", max_tokens=20)
    harness.run()
    code, text = harness.error_of("lost")
    assert code == "not_finite"
    assert "adapter 'bad'" in text and f"position {len(PROMPT) + 3}" in text
    assert len(harness.expected["lost"].token_ids) == 3  # Harness compares the others' answers
    assert harness.scheduler.stats()["finished"]["error"] == 1


def test_base_model_is_named() -> None:
    harness = make_harness()
    harness.worker.broken[""] = len(PROMPT)
    harness.add("lost", PROMPT)
    harness.run()
    assert "the base model" in harness.error_of("lost")[1]


def test_blocks_leave_the_prefix_cache() -> None:
    harness = make_harness()
    harness.worker.broken["bad"] = len(PROMPT)
    harness.add("lost", PROMPT, adapter="bad")
    harness.run()
    assert pages_in_prefix_cache(harness) == 0
    del harness.worker.broken["bad"]  # it was a passing fault
    harness.add("again", PROMPT, adapter="bad", max_tokens=3)
    harness.run()
    assert harness.expected["again"].num_cached_tokens == 0
    assert pages_in_prefix_cache(harness) > 0


def test_request_that_shares_the_blocks_goes_on_and_frees_them() -> None:
    harness = make_harness(max_num_batched_tokens=32)
    harness.add("sharer", PROMPT, adapter="bad", max_tokens=30)
    while not harness.expected["sharer"].token_ids:
        harness.turn()
    harness.worker.broken["bad"] = len(PROMPT) + 40  # of longer histories alone
    harness.add("lost", [*PROMPT, *([7] * 40)], adapter="bad", max_tokens=2)
    harness.run()
    assert harness.error_of("lost")[0] == "not_finite"
    assert len(harness.expected["sharer"].token_ids) == 30
    harness.add("later", PROMPT, adapter="bad", max_tokens=1)
    harness.run()
    assert harness.expected["later"].num_cached_tokens == 0


def test_equal_prompts_that_arrive_together_all_fail() -> None:
    harness = make_harness()
    harness.worker.broken["bad"] = len(PROMPT)
    for request_id in range(6):
        harness.add(request_id, PROMPT, adapter="bad")
    harness.run()
    assert {harness.error_of(request_id)[0] for request_id in range(6)} == {"not_finite"}
    assert pages_in_prefix_cache(harness) == 0


@pytest.mark.parametrize("num_batched_tokens", [8, 64])
def test_prompt_positions_that_are_asked_for_count_too(num_batched_tokens: int) -> None:
    harness = make_harness(max_num_batched_tokens=num_batched_tokens)
    harness.worker.broken["bad"] = 11
    harness.add("lost", PROMPT, adapter="bad", num_prompt_logprobs=0)
    harness.run()
    code, text = harness.error_of("lost")
    assert code == "not_finite"
    assert "position 11" in text
    assert pages_in_prefix_cache(harness) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_random_traffic_beside_a_broken_adapter(seed: int) -> None:
    """Integrity is checked after each operation, with little room, so that requests are preempted
    while their verdict is under way."""
    rng = random.Random(seed)
    harness = make_harness(num_pages=rng.choice((24, 40)), max_num_batched_tokens=24)
    harness.worker.broken["bad"] = rng.choice((9, 18, 30))
    bad, num_added = [], 0
    for _ in range(400):
        if rng.random() < 0.3 and num_added < 60:
            adapter = rng.choice(("bad", "good", ""))
            prompt = PROMPT[: rng.randrange(1, 20)] + [rng.randrange(3)]
            options = {"num_prompt_logprobs": 0} if rng.random() < 0.2 else {}
            harness.add(num_added, prompt, adapter=adapter, max_tokens=rng.randrange(1, 25),
                        **options)  # fmt: skip
            if adapter == "bad":
                bad.append(num_added)
            num_added += 1
        if rng.random() < 0.02 and num_added:
            harness.abort(rng.randrange(num_added))
        harness.turn()
    harness.run()
    assert bad
    for request_id in bad:
        expected = harness.expected[request_id]
        if expected.aborted:
            continue
        end, last = expected.end, len(expected.prompt) + len(expected.token_ids)
        assert end is not None
        is_broken = last >= harness.worker.broken["bad"] and end.finish_reason == "error"
        assert is_broken or last <= harness.worker.broken["bad"]
