"""Unfinished prompts share a step: a short one does not wait for a whole long one."""

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.scheduler.prompt_shares import MAX_PARTIAL_PROMPTS, prompt_shares

from helpers.scheduling.scheduler_harness import Harness


def make(budget: int = 64, *, caching: bool = True, check: bool = False) -> Harness:
    return Harness(
        num_pages=3000 if not check else 500,
        max_model_len=3500,
        max_num_seqs=16,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        check=check,
    )


def steps_to_first_token(harness: Harness, name: str, limit: int = 400) -> int:
    """Runs until the request has its first token. Returns the number of steps that took."""
    for step in range(1, limit):
        harness.plan()
        harness.commit()
        if harness.expected[name].token_ids:
            return step
    raise AssertionError(f"{name} has no token after {limit} steps")


@pytest.mark.parametrize("num_long", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 20, 200])
def test_a_short_prompt_gets_its_share_beside_long_ones(num_long: int, num_tokens: int) -> None:
    harness = make()
    for index in range(num_long):
        harness.add(f"long {index}", [index + 1] * 2000, max_tokens=1)
        harness.turn()
    harness.add("short", [9] * num_tokens, max_tokens=1)
    share = 64 // 2 // num_long
    assert steps_to_first_token(harness, "short") <= ceil(num_tokens / share)
    assert not harness.expected["long 0"].token_ids
    harness.run()


def test_the_first_prompt_takes_at_most_twice_its_time_alone() -> None:
    alone, crowded = make(), make()
    for harness in (alone, crowded):
        harness.add("first", [1] * 3000, max_tokens=1)
        harness.turn()
    for index in range(10):
        crowded.add(index, [index + 2] * 3000, max_tokens=1)
    wait = steps_to_first_token(alone, "first")
    assert steps_to_first_token(crowded, "first") <= 2 * wait


def test_a_lone_prompt_has_the_whole_step() -> None:
    harness = make()
    harness.add("a", [1] * 640, max_tokens=1)
    assert steps_to_first_token(harness, "a") == 10


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    budget=st.integers(16, 200),
    caching=st.booleans(),
)
def test_no_step_is_smaller_than_it_could_be(
    lengths: list[int], budget: int, caching: bool
) -> None:
    """Prompts that differ, one token of answer each: every step but the last one is full."""
    harness = make(budget, caching=caching)
    for index, length in enumerate(lengths):
        harness.add(index, [index + 1] * length, max_tokens=1)
    harness.run()
    sizes = [sum(plan.num_tokens) for plan in harness.plans]
    assert sizes[:-1] == [budget] * (len(sizes) - 1)
    assert sum(sizes) == sum(lengths)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(100, 300), min_size=1, max_size=14),
    decodes=st.integers(0, 4),
)
def test_few_prompts_are_computed_in_part_at_one_time(lengths: list[int], decodes: int) -> None:
    harness = make()
    for index in range(decodes):
        harness.add(100 + index, [90 + index], max_tokens=100)
    for index, length in enumerate(lengths):
        harness.add(index, [index + 1] * length, max_tokens=1)
    while harness.scheduler.num_unfinished:
        harness.turn()
        unfinished = [
            request
            for request in harness.requests.values()
            if request.slot >= 0 and 0 < request.num_scheduled < request.num_prompt_tokens
        ]
        assert len(unfinished) <= MAX_PARTIAL_PROMPTS
    harness.check_all_ended()


def test_equal_prompts_are_still_computed_once() -> None:
    harness = make(check=True)
    harness.add("other", [7] * 500, max_tokens=1)
    harness.turn()
    for name in ("a", "b", "c"):
        harness.add(name, [1] * 400, max_tokens=1)
    harness.run()
    num_fed = sum(sum(plan.num_tokens) for plan in harness.plans)
    assert num_fed <= 500 + 400 + 3 * 4  # each but the first computes its last block itself


@given(
    num_left=st.lists(st.integers(1, 50), max_size=6),
    budget=st.integers(0, 100),
    newcomers=st.booleans(),
)
def test_shares_keep_the_bound(num_left: list[int], budget: int, newcomers: bool) -> None:
    shares = prompt_shares(num_left, budget, newcomers=newcomers)
    assert sum(shares) <= budget
    assert all(0 <= share <= left for share, left in zip(shares, num_left, strict=True))
    if not num_left:
        return
    assert shares[0] >= min(num_left[0], ceil(budget / 2))
    others = len(num_left) - 1 + newcomers
    for share, left in zip(shares[1:], num_left[1:], strict=True):
        assert share >= min(left, budget // 2 // others)
    if newcomers:
        assert budget - sum(shares) >= budget // 2 // others
