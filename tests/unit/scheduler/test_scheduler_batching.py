"""Contents of a step, their order, and how requests end."""

import pytest

from loraplex.memory.accounting.block_manager import Owner
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.worker_protocol import StepResult, int_array

from helpers.fakes.fake_model import oracle, sampling_spec
from helpers.scheduling.scheduler_harness import Harness, sequences


def stop_after(prompt: list[int], num_tokens: int) -> int:
    """The token that the fake model generates as the `num_tokens`-th after this prompt."""
    tokens, _, _ = oracle(prompt, "", sampling_spec(max_tokens=num_tokens), 1000, 50)
    assert tokens[-1] not in tokens[:-1]
    return tokens[-1]


def rows(harness: Harness, step: int) -> list[tuple[int, int, int, int]]:
    plan = harness.plans[step]
    return list(zip(plan.slots, plan.positions, plan.num_tokens, plan.samples, strict=True))


def test_one_request_from_prompt_to_end() -> None:
    harness = Harness()
    harness.add("a", [1, 2, 3], max_tokens=3)
    harness.run()
    assert [rows(harness, step) for step in range(3)] == [
        [(0, 0, 3, 1)],
        [(0, 3, 1, 1)],
        [(0, 4, 1, 1)],
    ]
    assert len(harness.plans) == 3
    end = harness.expected["a"].end
    assert end is not None
    assert end.finish_reason == "length"


def test_prompts_are_chunked_and_mixed_behind_decodes() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add("a", [1] * 4, max_tokens=10)
    harness.plan()
    harness.commit()
    harness.add("b", [2] * 10, max_tokens=3)
    harness.add("c", [3] * 5, max_tokens=3)
    harness.plan()
    assert rows(harness, 1) == [(0, 4, 1, 1), (1, 0, 7, 0)]
    harness.commit()
    harness.plan()
    assert rows(harness, 2) == [(0, 5, 1, 1), (1, 7, 3, 1), (2, 0, 4, 0)]
    harness.commit()
    harness.plan()
    assert rows(harness, 3) == [(0, 6, 1, 1), (1, 10, 1, 1), (2, 4, 1, 1)]
    harness.run()


def test_requests_start_in_order_of_priority_then_arrival() -> None:
    harness = Harness(max_num_seqs=1, max_num_batched_tokens=64)
    for name, priority in [("late", 5), ("first", 0), ("second", 0), ("urgent", -1)]:
        harness.add(name, [1, 2], priority=priority, max_tokens=1)
    ended = []
    while harness.scheduler.num_unfinished:
        harness.plan()
        ended += [harness.name_of(update.request_id) for update in harness.commit()]
    assert ended == ["urgent", "first", "second", "late"]


def test_no_more_than_max_num_seqs_run() -> None:
    harness = Harness(max_num_seqs=3)
    for index in range(7):
        harness.add(index, [index], max_tokens=4)
    while harness.scheduler.num_unfinished:
        harness.turn()
        assert harness.scheduler.stats()["running"] <= 3
    harness.check_all_ended()


def test_lengths_are_never_overrun_though_planned_ahead() -> None:
    harness = Harness(max_steps_in_flight=3, max_model_len=12)
    harness.add("max_tokens", [1] * 4, max_tokens=2)
    harness.add("max_model_len", [2] * 9, max_tokens=100)
    harness.run()
    assert harness.scheduler.stats()["num_dropped_tokens"] == 0
    assert len(harness.expected["max_tokens"].token_ids) == 2
    assert len(harness.expected["max_model_len"].token_ids) == 3


def test_stop_token_ends_and_is_reported() -> None:
    harness = Harness()
    stop = stop_after([5, 6], 3)
    harness.add("a", [5, 6], max_tokens=20, stop_token_ids=(stop,))
    harness.run()
    end = harness.expected["a"].end
    assert end is not None
    assert (end.finish_reason, end.stop_token_id) == ("stop", stop)
    assert len(harness.expected["a"].token_ids) == 3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_stop_found_late_costs_tokens_but_shows_none(steps: int) -> None:
    harness = Harness(max_steps_in_flight=steps)
    harness.add("a", [5, 6], max_tokens=20, stop_token_ids=(stop_after([5, 6], 3),))
    harness.run()
    assert len(harness.expected["a"].token_ids) == 3
    assert harness.scheduler.stats()["num_dropped_tokens"] == steps - 1


def test_stop_tokens_within_min_tokens_do_not_end() -> None:
    """The worker masks them; if one came all the same it would not count."""
    harness = Harness()
    harness.add("a", [1], max_tokens=5, min_tokens=2, stop_token_ids=(7,))
    for token_id, reason in [(7, ""), (7, ""), (7, "stop")]:
        plan = harness.scheduler.plan()
        assert plan is not None
        result = StepResult(plan.step_id, int_array([token_id]))
        (update,) = sequences(harness.scheduler.commit(result))
        assert update.finish_reason == reason
    assert harness.scheduler.num_unfinished == 0


def test_freed_slot_goes_to_the_next_request_in_the_same_plan() -> None:
    harness = Harness(max_num_seqs=1, max_steps_in_flight=2)
    harness.add("a", [1], max_tokens=1)
    harness.add("b", [2], max_tokens=2)
    harness.plan()
    harness.commit()
    plan = harness.plan()
    assert plan is not None
    assert list(plan.freed_slots) == [0]
    assert [new.slot for new in plan.new_requests] == [0]
    harness.run()


def test_results_belong_to_the_request_that_had_the_slot_then() -> None:
    """A step of the old owner is in flight while the slot already has a new one."""
    harness = Harness(max_num_seqs=1, max_steps_in_flight=2)
    harness.add("a", [1], max_tokens=9)
    harness.add("b", [2], max_tokens=2)
    harness.plan()
    harness.abort("a")
    harness.plan()  # b, in slot 0; the first result is still to come
    assert [new.slot for new in harness.plans[1].new_requests] == [0]
    assert harness.commit() == []
    (update,) = harness.commit()
    assert harness.name_of(update.request_id) == "b"
    harness.run()


def test_abort_in_every_state() -> None:
    harness = Harness(max_num_seqs=1, max_num_batched_tokens=4, max_steps_in_flight=2)
    harness.register("x", error="broken")
    harness.add("prefill", [1] * 10, max_tokens=3)
    harness.add("queued", [2], max_tokens=3)
    harness.add("parked", [3], adapter="x", max_tokens=3)
    harness.plan()
    for name in ("queued", "parked", "prefill"):
        assert harness.abort(name)
        assert not harness.abort(name)
    assert not harness.abort("never seen")
    harness.add("decode", [4, 5], max_tokens=9)
    harness.plan()
    harness.commit()
    harness.commit()
    harness.plan()
    assert harness.abort("decode")
    harness.run()
    assert harness.scheduler.stats()["finished"]["abort"] == 4


def test_id_of_an_aborted_request_may_be_used_again_at_once() -> None:
    harness = Harness(max_steps_in_flight=2)
    harness.add("a", [1, 2, 3], max_tokens=5)
    harness.plan()
    harness.plan()
    harness.abort("a")
    harness.add("a", [4, 5], max_tokens=2)
    harness.run()


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"prompt": []}, "bad_request", "no tokens"),
        ({"prompt": [1] * 64}, "bad_request", "max_model_len"),
        ({"prompt": [1], "max_tokens": 0}, "bad_request", "max_tokens"),
        ({"prompt": [1], "adapter": "nobody"}, "unknown_adapter", "nobody"),
        ({"prompt": [1] * 30, "max_tokens": 30}, "bad_request", "the pool has 9"),
        ({"prompt": [1], "request_id": "twin"}, "bad_request", "in use"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict, code: str, text: str) -> None:
    harness = Harness(num_pages=10)
    harness.add("twin", [1], max_tokens=1)
    request_id, prompt = options.pop("request_id", "a"), options.pop("prompt")
    with pytest.raises(Exception, match=text) as refusal:
        harness.add(request_id, prompt, **options)
    assert refusal.value.code == code  # type: ignore[attr-defined]
    harness.run()


def test_request_that_just_fits_is_served() -> None:
    harness = Harness(num_pages=10)  # 9 pages of 4 tokens; the last token needs no KV
    harness.add("a", [1] * 30, max_tokens=7)
    assert harness.try_add("b", [1] * 30, max_tokens=8) == "bad_request"
    harness.run()


def test_queue_is_bounded() -> None:
    harness = Harness(max_queue_len=2, max_num_seqs=1)
    codes = [harness.try_add(index, [1], max_tokens=1) for index in range(4)]
    assert codes == ["", "", "queue_full", "queue_full"]
    harness.plan()
    assert harness.try_add("later", [1], max_tokens=1) == ""
    harness.run()


def test_wrong_results_are_refused() -> None:
    harness = Harness(max_steps_in_flight=2)
    with pytest.raises(ValueError, match="no step is in flight"):
        harness.scheduler.commit(StepResult(0, int_array()))
    harness.add("a", [1], max_tokens=5)
    harness.plan()
    with pytest.raises(ValueError, match="0 is next"):
        harness.scheduler.commit(StepResult(1, int_array([1])))
    with pytest.raises(ValueError, match="samples 1 tokens, got 2"):
        harness.scheduler.commit(StepResult(0, int_array([1, 2])))
    harness.run()


def test_plan_says_none_when_idle_or_far_enough_ahead() -> None:
    harness = Harness(max_steps_in_flight=2)
    assert harness.plan() is None
    harness.add("a", [1], max_tokens=9)
    assert harness.plan() is not None
    assert harness.plan() is not None
    assert harness.plan() is None
    harness.run()


def test_logprobs_reach_their_request() -> None:
    harness = Harness(max_num_batched_tokens=8, max_steps_in_flight=2)
    harness.add("plain", [1, 2], max_tokens=4)
    harness.add("asked", [3, 4, 5, 6, 7, 8, 9, 10, 11], max_tokens=4, num_logprobs=0,
                num_prompt_logprobs=0)  # fmt: skip
    harness.run()  # the harness counts and matches them
    assert harness.expected["asked"].num_prompt_logprobs == 8
    assert harness.expected["asked"].num_logprobs == 4
    assert harness.expected["plain"].num_logprobs == 0


def test_lost_pages_fail_the_request_rather_than_hang() -> None:
    harness = Harness(num_pages=10, check=False)
    harness.scheduler.memory.blocks.allocate(Owner.KV, 9)  # all, for no tenant
    harness.add("a", [1], max_tokens=1)
    harness.add("b", [1], max_tokens=1)
    assert harness.plan() is None
    end = harness.expected["a"].end
    assert end is not None
    assert (end.finish_reason, end.error_code) == ("error", "internal")
    assert harness.scheduler.num_unfinished == 0


def test_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"fcfs.*lottery"):
        SchedulerConfig(policy="lottery")


def test_stats_are_plain_and_add_up() -> None:
    harness = Harness(max_num_seqs=2, max_num_batched_tokens=8)
    harness.register("x", num_pages=3)
    harness.add("a", [1] * 5, max_tokens=9, adapter="x")
    harness.add("b", [1] * 5, max_tokens=9)
    while harness.scheduler.stats()["running"] < 2:
        assert harness.turn()
    stats = harness.scheduler.stats()
    assert stats["pages_adapter"] == 3
    assert stats["pages_kv"] >= 3
    pages = sum(stats[f"pages_{use}"] for use in ("free", "kv", "prefix", "adapter"))
    assert pages == stats["num_pages"] == 63
    (resident,) = harness.list_resident()
    assert (resident["names"], resident["num_users"]) == (["x"], 1)
    harness.run()
    stats = harness.scheduler.stats()
    assert stats["finished"] == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert stats["num_generated_tokens"] == 18
    assert stats["num_scheduled_tokens"] == 2 * (5 + 8)


def test_the_first_output_says_how_long_the_request_waited() -> None:
    harness = Harness(max_num_seqs=1)
    outputs = []
    harness.add(0, [1, 2], max_tokens=3)
    harness.add(1, [3, 4], max_tokens=2)
    while harness.scheduler.num_unfinished:
        harness.now += 0.25
        assert harness.plan() is not None
        outputs += harness.commit()
    first = {output.request_id: output.queued_us for output in reversed(outputs)}
    assert first == {0: 250_000, 1: 1_000_000}
