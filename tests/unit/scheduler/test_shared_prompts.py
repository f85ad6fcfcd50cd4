"""Requests with equal prompts that arrive together compute the prompt once.

The fake worker checks every row of KV that a step reads against the history it should hold, so a
block that is shared before it is written, or written by two requests, fails at once.
"""

import random
from typing import Any

import pytest

from helpers.scheduling.scheduler_harness import Harness

LONG = [i % 40 for i in range(1024)]

SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(8, 50))]


def num_planned(harness: Harness) -> int:
    """Prompt tokens planned so far, of tests in which every request generates one token."""
    return int(harness.scheduler.stats()["num_scheduled_tokens"])


def long_harness(**options: Any) -> Harness:
    return Harness(
        **{
            "num_pages": 1000,
            "block_tokens": 16,
            "max_num_batched_tokens": 8192,
            "max_model_len": 2048,
            "max_steps_in_flight": 2,
        }
        | options
    )


def test_eight_equal_prompts_plan_their_tokens_once() -> None:
    harness = long_harness()
    for request_id in range(8):
        harness.add(request_id, LONG, max_tokens=1)
    harness.run()
    assert num_planned(harness) == 1024 + 7 * 16  # the last block of each has the token to compute


@pytest.mark.parametrize("num_batched_tokens", [100, 512, 1040])
def test_equal_prompts_are_shared_when_chunked(num_batched_tokens: int) -> None:
    harness = long_harness(max_num_batched_tokens=num_batched_tokens)
    for request_id in range(8):
        harness.add(request_id, LONG, max_tokens=1)
    harness.run()
    assert num_planned(harness) == 1024 + 7 * 16
    cached = [harness.expected[request_id].num_cached_tokens for request_id in range(8)]
    assert cached == [0] + [1008] * 7


def test_second_request_starts_in_the_next_step_without_any_result() -> None:
    harness = long_harness()
    harness.add("a", LONG, max_tokens=4)
    harness.add("b", LONG, max_tokens=4)
    harness.add("other", [7] * 20, max_tokens=4)
    first, second = harness.plan(), harness.plan()
    assert first is not None
    assert second is not None
    assert list(first.num_tokens) == [1024, 20]  # the other one does not wait for the prefix
    assert list(second.num_tokens) == [1, 1, 16]
    harness.run()


def test_prompts_that_differ_late_share_what_is_equal() -> None:
    harness = long_harness()
    for request_id in range(4):
        harness.add(request_id, [*LONG[:512], *[request_id] * 100], max_tokens=1)
    harness.run()
    assert num_planned(harness) == 612 + 3 * 100


def test_prompt_of_less_than_a_block_waits_for_nothing() -> None:
    harness = long_harness()
    for request_id in range(4):
        harness.add(request_id, LONG[:16], max_tokens=1)
    plan = harness.plan()
    assert plan is not None
    assert list(plan.num_tokens) == [16] * 4
    harness.run()


def test_tenants_see_nothing_of_each_others_prompts() -> None:
    harness = long_harness()
    tenants = ["", "ann", "ben", "ann", "", "ben"]
    for number, tenant in enumerate(tenants):
        salt = "shared" if tenant else ""
        harness.add(number, LONG[:64], tenant=tenant, salt=salt, max_tokens=1)
        harness.run()
    cached = [harness.requests[number].num_cached_tokens > 0 for number in range(len(tenants))]
    assert cached == [False, False, False, True, True, True]


def test_salts_and_adapters_do_not_share() -> None:
    harness = long_harness()
    harness.register("x")
    harness.register("y")
    harness.register("same", "x")
    for adapter in ("", "x", "y", "same"):
        for salt in ("", "tenant"):
            harness.add((adapter, salt), LONG[:64], adapter=adapter, salt=salt, max_tokens=1)
    harness.settle()
    harness.run()
    # "x" and "same" have one content; all others differ in the adapter or in the salt.
    assert num_planned(harness) == 6 * 64 + 2 * 16


@pytest.mark.parametrize("options", [{"use_prefix_cache": False}, {"num_prompt_logprobs": 0}])
def test_requests_that_read_no_cache_compute_all_and_wait_for_nobody(
    options: dict[str, Any],
) -> None:
    harness = long_harness()
    harness.add("a", LONG, max_tokens=1)
    harness.add("b", LONG, max_tokens=1, **options)
    plan = harness.plan()
    assert plan is not None
    assert list(plan.num_tokens) == [1024, 1024]
    harness.run()
    assert harness.expected["b"].num_cached_tokens == 0


def test_nothing_is_shared_without_prefix_caching() -> None:
    harness = long_harness(enable_prefix_caching=False)
    for request_id in range(3):
        harness.add(request_id, LONG, max_tokens=1)
    plan = harness.plan()
    assert plan is not None
    assert list(plan.num_tokens) == [1024] * 3
    harness.run()


def test_planned_chunks_of_an_aborted_request_are_shared() -> None:
    """They are computed whatever becomes of the request: planned steps always run."""
    harness = long_harness(max_num_batched_tokens=256)
    harness.add("a", LONG, max_tokens=1)
    harness.add("b", LONG, max_tokens=1)
    harness.plan()
    harness.plan()
    harness.abort("a")
    harness.run()
    assert harness.expected["b"].num_cached_tokens == 512
    assert num_planned(harness) == 1024


def test_chunks_that_were_not_planned_are_not_shared() -> None:
    harness = long_harness(max_num_batched_tokens=256, max_steps_in_flight=1)
    harness.add("a", LONG, max_tokens=1)
    harness.plan()
    harness.abort("a")
    harness.add("b", LONG, max_tokens=1)
    harness.run()
    assert harness.expected["b"].num_cached_tokens == 256


def test_pages_of_an_aborted_prefill_can_be_taken_while_its_step_runs() -> None:
    harness = long_harness(num_pages=72, max_model_len=1056)
    harness.add("a", LONG, max_tokens=1)
    harness.plan()
    harness.abort("a")
    harness.add("b", LONG[::-1], max_tokens=1)
    harness.run()
    assert harness.expected["b"].num_cached_tokens == 0


def test_preempted_twins_share_again() -> None:
    harness = Harness(num_pages=14, block_tokens=4, max_model_len=40, max_num_seqs=4)
    for request_id in range(4):
        harness.add(request_id, list(range(16)), max_tokens=20)
    harness.run()
    stats = harness.scheduler.stats()
    assert stats["num_preemptions"]
    assert stats["prefix_hit_tokens"] >= 3 * 12


@pytest.mark.parametrize("seed", SEEDS)
def test_random_bursts_of_equal_prompts(seed: int) -> None:
    """Few prompts, many requests, small budgets and pools; the harness checks after each call."""
    rng = random.Random(seed)
    max_num_seqs = rng.randint(1, 6)
    harness = Harness(
        num_pages=rng.randint(14, 40),
        block_tokens=rng.choice([1, 2, 4]),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 60]),
        max_steps_in_flight=rng.randint(1, 3),
        max_model_len=24,
        max_adapter_slots=2,
    )
    harness.register("x", num_pages=2)
    prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(2)]
    prompts.append(prompts[0] + prompts[1][:4])
    actions = [harness.plan, lambda: harness.results and harness.commit()]
    for _ in range(12):
        prompt, adapter = rng.choice(prompts), rng.choice(["", "", "x"])
        salt = rng.choice(["", "", "tenant"])
        for _ in range(rng.randint(1, 6)):
            options = {"max_tokens": rng.randint(1, 8), "use_prefix_cache": rng.random() < 0.9}
            request_id = len(harness.expected)
            harness.try_add(request_id, prompt, adapter=adapter, salt=salt, **options)
        for _ in range(rng.randint(0, 6)):
            rng.choice(actions)()
            if rng.random() < 0.1:
                harness.abort(rng.choice(list(harness.expected)))
    harness.run()
