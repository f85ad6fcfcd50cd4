"""Preemption, the prefix cache and admission: memory is short, and nothing is lost."""

import pytest

from helpers.scheduling.scheduler_harness import Harness


def run_until_preempted(harness: Harness) -> None:
    while not harness.scheduler.stats()["num_preemptions"]:
        assert harness.turn()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_newest_is_preempted_and_resumes(steps: int) -> None:
    harness = Harness(num_pages=8, max_steps_in_flight=steps)
    harness.add("old", [1, 2, 3], max_tokens=20)
    harness.add("new", [4, 5, 6], max_tokens=20)
    run_until_preempted(harness)
    assert harness.expected["old"].end is None
    harness.run()
    placed = [new for plan in harness.plans for new in plan.new_requests]
    resumed = placed[2:]
    assert resumed
    assert all(list(new.token_ids)[:3] == [4, 5, 6] for new in resumed), "the old one was preempted"
    assert all(new.num_prompt_tokens == 3 < len(new.token_ids) for new in resumed)


def test_ids_in_flight_at_preemption_are_kept_and_awaited() -> None:
    harness = Harness(num_pages=8, max_steps_in_flight=2)
    harness.add("old", [1, 2, 3], max_tokens=20)
    harness.add("new", [4, 5, 6], max_tokens=20)
    while True:
        harness.plan()
        stats = harness.scheduler.stats()
        if stats["num_preemptions"]:
            break
        if len(harness.results) == 2:
            harness.commit()
    before = list(harness.expected["new"].token_ids)
    while harness.results:
        harness.commit()
    assert len(harness.expected["new"].token_ids) > len(before)
    harness.run()


def test_late_id_may_end_a_preempted_request() -> None:
    """Its last token is in flight when it loses its pages; it never resumes."""
    harness = Harness(num_pages=6, max_steps_in_flight=2, enable_prefix_caching=False)
    harness.add("old", [1] * 8, max_tokens=9)
    harness.add("new", [2] * 7, max_tokens=2)
    harness.plan()
    harness.plan()  # old grows into the last page, new's last token is in flight
    assert harness.scheduler.stats()["pages_free"] == 0
    new = harness.requests["new"]
    harness.scheduler._planner._preempt(new, 0.0)
    harness.verify()
    harness.run()
    assert len(harness.expected["new"].token_ids) == 2
    assert len([n for plan in harness.plans for n in plan.new_requests]) == 2


def test_prompt_may_be_preempted_between_its_chunks() -> None:
    harness = Harness(num_pages=6, max_num_seqs=2, max_num_batched_tokens=2)
    harness.add("old", [1, 2], max_tokens=14)
    harness.plan()
    harness.commit()
    harness.add("new", [3] * 12, max_tokens=1)  # one token a step beside the old one's
    run_until_preempted(harness)
    assert not harness.expected["new"].token_ids
    harness.run()


def test_abort_of_a_preempted_request() -> None:
    harness = Harness(num_pages=8, max_steps_in_flight=2)
    harness.add("old", [1, 2, 3], max_tokens=20)
    harness.add("new", [4, 5, 6], max_tokens=20)
    run_until_preempted(harness)
    assert harness.abort("new")
    harness.run()


def test_preempted_prompt_logprobs_come_once() -> None:
    harness = Harness(num_pages=8, max_num_seqs=2, max_num_batched_tokens=4)
    harness.add("old", [1, 2, 3], max_tokens=20)
    harness.add("new", [4, 5, 6, 7, 8, 9], max_tokens=12, num_prompt_logprobs=2, num_logprobs=1)
    run_until_preempted(harness)
    harness.run()


def test_prompt_waits_until_all_its_pages_are_there() -> None:
    harness = Harness(num_pages=11, max_num_seqs=4, max_num_batched_tokens=4)
    harness.add("a", [1] * 21, max_tokens=3)  # 6 pages, and 4 are left
    harness.add("b", [2] * 17, max_tokens=1)  # 5 pages
    harness.add("c", [3], max_tokens=1)  # would fit, but is behind b
    harness.plan()
    stats = harness.scheduler.stats()
    assert (stats["running"], stats["waiting"], stats["pages_kv"]) == (1, 2, 6)
    harness.run()


def test_admission_spares_a_page_for_each_running_request() -> None:
    harness = Harness(num_pages=5)  # 4 pages
    harness.add("a", [1] * 4, max_tokens=8)
    harness.add("b", [2] * 4, max_tokens=8)
    harness.add("c", [3] * 4, max_tokens=8)
    harness.plan()
    assert harness.scheduler.stats()["running"] == 2  # a third would leave one for all three
    harness.run()


def test_shared_prompt_is_computed_once() -> None:
    harness = Harness()
    prompt = list(range(20))
    harness.add("a", prompt, max_tokens=2)
    harness.run()
    harness.add("b", [*prompt, 30], max_tokens=2)
    harness.add("c", prompt, max_tokens=2)
    harness.run()
    cached = {name: harness.expected[name].num_cached_tokens for name in "abc"}
    assert cached == {"a": 0, "b": 20, "c": 16}
    stats = harness.scheduler.stats()
    assert (stats["prefix_hit_tokens"], stats["prefix_query_tokens"]) == (36, 61)


def test_generated_tokens_are_cached_as_well() -> None:
    harness = Harness(max_steps_in_flight=2)
    harness.add("a", [1, 2, 3], max_tokens=14)
    harness.run()
    answer = harness.expected["a"].token_ids
    harness.add("b", [1, 2, 3, *answer, 9], max_tokens=1)
    harness.run()
    assert harness.expected["b"].num_cached_tokens == 16  # the last token's KV was never computed


def test_prefix_is_shared_while_its_first_user_still_runs() -> None:
    harness = Harness()
    prompt = list(range(12))
    harness.add("a", prompt, max_tokens=20)
    harness.plan()
    harness.add("early", prompt, max_tokens=2)
    harness.commit()
    harness.plan()
    harness.run()
    assert harness.expected["early"].num_cached_tokens == 8


@pytest.mark.parametrize(
    "options", [{"salt": "other"}, {"use_prefix_cache": False}, {"num_prompt_logprobs": 0},
                {"adapter": "x"}]
)  # fmt: skip
def test_what_must_not_read_the_cache_does_not(options: dict) -> None:
    harness = Harness()
    harness.register("x")
    prompt = list(range(20))
    harness.add("a", prompt, max_tokens=2)
    harness.run()
    harness.add("b", prompt, max_tokens=2, **options)
    harness.run()
    assert harness.expected["b"].num_cached_tokens == 0


def test_equal_adapters_share_prefixes_and_pages_whatever_their_names() -> None:
    harness = Harness()
    harness.register("x", "same content", num_pages=2)
    harness.register("y", "same content", num_pages=2)
    prompt = list(range(20))
    for name in ("x", "y"):
        harness.add(name, prompt, adapter=name, max_tokens=2)
        harness.run()
    assert harness.expected["y"].num_cached_tokens == 16
    assert harness.worker.num_loads == 1
    assert harness.scheduler.stats()["pages_adapter"] == 2


def test_preempted_request_finds_its_own_blocks_again() -> None:
    harness = Harness(num_pages=12, max_num_seqs=2)
    harness.add("old", [1] * 9, max_tokens=30)
    harness.add("new", list(range(10, 26)), max_tokens=20)
    run_until_preempted(harness)
    harness.run()
    assert harness.scheduler.stats()["prefix_hit_tokens"] > 0
    assert harness.expected["new"].num_cached_tokens == 0  # as it was at first


def test_cheap_idle_memory_is_evicted_first() -> None:
    """A block of four tokens is cheaper to bring back than a quarter of a load."""
    harness = Harness(num_pages=13, max_model_len=64)
    harness.register("x", num_pages=4)
    harness.add("x", [1], adapter="x", max_tokens=1)
    harness.run()  # the adapter is idle since now
    harness.add("newer", list(range(9)), max_tokens=1)
    harness.run()  # two prefix blocks
    assert harness.scheduler.stats()["pages_prefix"] == 2
    harness.add("big", [2] * 29, max_tokens=1, use_prefix_cache=False)  # 8 of 12 pages
    harness.plan()
    stats = harness.scheduler.stats()
    assert (stats["pages_adapter"], stats["pages_prefix"]) == (4, 0)
    assert stats["num_adapter_unloads"] == 0
    harness.run()
