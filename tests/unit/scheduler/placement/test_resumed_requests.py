"""A request that another engine has begun goes on with the same tokens, as if preempted here."""

import pytest

from loraplex.scheduler.adapters.usage import Usage

from helpers.scheduling.scheduler_harness import Harness

PROMPT = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_resumed", [1, 4, 9])
def test_the_rest_of_the_answer_follows_and_nothing_is_sent_twice(num_resumed: int) -> None:
    harness = Harness()
    harness.register("a")
    harness.add(
        0, PROMPT, adapter="a", max_tokens=10, min_tokens=6, stop_token_ids=(1, 2, 3),
        num_logprobs=0, num_prompt_logprobs=0, num_resumed=num_resumed,
    )  # fmt: skip
    harness.run()  # compares tokens, reasons and log-probabilities with the oracle
    assert harness.expected[0].num_cached_tokens == 0


def test_it_starts_before_requests_that_never_started() -> None:
    harness = Harness(max_num_seqs=1, policy={"policy": "vtc"})
    harness.add("new", PROMPT, max_tokens=3)
    harness.add("resumed", PROMPT, max_tokens=8, num_resumed=2)
    harness.plan()
    running = [request.request_id for request in harness.scheduler.running]
    assert running == [harness.number_of("resumed")]
    harness.run()


def test_it_is_never_given_up_for_a_late_first_token() -> None:
    harness = Harness(max_num_seqs=1, policy={"policy": "abort", "ttft_slo_s": 1.0})
    harness.add("running", PROMPT, max_tokens=12)
    harness.plan()
    harness.add("resumed", PROMPT, max_tokens=8, num_resumed=2)
    harness.add("late", PROMPT, max_tokens=8)
    harness.run()
    assert harness.error_of("late")[0] == "deadline"
    end = harness.expected["resumed"].end
    assert end is not None and end.finish_reason == "length"


def test_usage_counts_only_what_this_engine_generates() -> None:
    harness = Harness()
    harness.add(0, PROMPT, max_tokens=10, num_resumed=4)
    harness.run()
    usage: Usage = harness.scheduler.adapters.usage_stats.base
    assert (usage.num_generated_tokens, usage.num_first_tokens) == (6, 0)


def test_an_answer_that_is_complete_already_is_refused() -> None:
    harness = Harness()
    harness.add("whole", PROMPT, max_tokens=5, num_resumed=4)
    harness.run()
    spec = harness.expected["whole"]
    request = harness.requests["whole"]
    assert len(spec.token_ids) == 5
    again = type(request)(
        request_id=7,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        generated_token_ids=request.token_ids[len(PROMPT) :],
    )
    with pytest.raises(Exception, match="5 tokens were generated already"):
        harness.scheduler.add(again)
