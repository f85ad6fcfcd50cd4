"""The times of a request in its last reply, and the histograms of finished requests."""

import itertools
import random
import time
from pathlib import Path

import pytest

from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.frontend.request_log import RequestTimes
from loraplex.engine.frontend.statistics.frontend_counts import FrontendCounts
from loraplex.engine.frontend.statistics.request_histograms import BOUNDS, RequestHistograms
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, FrontendHarness


@pytest.fixture
def harness(codec: TextCodec) -> FrontendHarness:
    return FrontendHarness(codec)


def test_the_last_reply_has_the_times(harness: FrontendHarness) -> None:
    harness.ask(A)
    (added,) = harness.take_sent(AddRequest)
    harness.output(added.request_id, [70], queued_us=1)
    (first,) = harness.take()
    assert "times" not in first
    harness.output(added.request_id, [71], finish_reason="length", queued_us=99)
    (last,) = harness.take()
    times = last["times"]
    assert times["queued_s"] == 1e-6
    assert 0 < times["first_token_s"] < times["last_token_s"] < 60
    assert times["arrival_time"] > 1.7e9


def test_a_cancelled_request_has_no_token_times(harness: FrontendHarness) -> None:
    harness.ask(A)
    harness.ask(A, "cancel")
    (last,) = harness.take()
    assert last["times"]["first_token_s"] is last["times"]["queued_s"] is None
    stats: dict[str, dict[str, dict[str, int]]] = harness.stats  # type: ignore[assignment]
    assert stats["histograms"]["request_params_n"]["count"] == 0


def test_finished_requests_are_counted(harness: FrontendHarness) -> None:
    harness.ask(A, sampling_params={"n": 2})
    for added in harness.take_sent(AddRequest):
        harness.output(added.request_id, [70, 71, 72], finish_reason="length")
    found: dict[str, dict[str, object]] = harness.stats["histograms"]  # type: ignore[assignment]
    assert found["request_generation_tokens"]["sum"] == 6.0
    assert found["request_prompt_tokens"]["sum"] == 3.0
    assert found["request_params_n"]["buckets"]["1.0"] == 0  # type: ignore[index]
    assert found["request_params_n"]["buckets"]["2.0"] == 1  # type: ignore[index]
    between = found.pop("inter_token_latency_seconds")
    assert between["count"] == 0, "each sequence has one output"
    assert {entry["count"] for entry in found.values()} == {1}


def test_the_time_between_tokens_is_that_of_each_sequence(harness: FrontendHarness) -> None:
    harness.ask(A, sampling_params={"n": 2})
    first, second = harness.take_sent(AddRequest)
    harness.output(first.request_id, [70])
    time.sleep(0.02)
    harness.output(second.request_id, [70])
    harness.output(second.request_id, [71])
    time.sleep(0.01)
    harness.output(first.request_id, [71])
    found = harness.stats["histograms"]["inter_token_latency_seconds"]  # type: ignore[index]
    assert found["count"] == 2
    assert found["sum"] >= 0.03


def test_ends_are_counted_by_reason(harness: FrontendHarness) -> None:
    for request_id in ("stop", "cancel", "fail"):
        harness.ask(A, request_id=request_id, sampling_params={"n": 2})
    added = harness.take_sent(AddRequest)
    harness.output(added[0].request_id, [70], finish_reason="stop")
    harness.output(added[1].request_id, [70], finish_reason="length")
    harness.ask(A, "cancel", request_id="cancel")
    harness.output(added[4].request_id, [], finish_reason="error", error="x", error_code="adapter")
    assert harness.stats["ends"] == {"stop": 1, "length": 1, "abort": 2, "error": 2}


def test_the_counts_of_frontends_add_up(tmp_path: Path) -> None:
    times = RequestTimes(queued_s=0.1, first_token_s=0.5, last_token_s=2.0)
    for name in ("frontend 0", "http 0", "http 1"):
        counts = FrontendCounts.in_run_dir(str(tmp_path), name)
        counts.stores.count_download(0.7, 100)
        counts.requests.observe(times, num_prompt=4, num_output=6, n=1)
        for reason in ("stop", "unknown_adapter", "queue_full"):
            counts.requests.count_end(reason)
    again = FrontendCounts.in_run_dir(str(tmp_path), "http 0")  # started again
    again.requests.observe(times, num_prompt=4, num_output=6, n=1)
    again.stores.count_lookup("missing")
    sums = FrontendCounts.sum_in(str(tmp_path))
    stores, total = sums.stores.snapshot(), sums.requests
    assert (stores["download_bytes"], stores["lookups"]["missing"]) == (300, 1)
    assert stores["download_seconds"]["buckets"]["1.0"] == 3
    assert total.ends == {"stop": 3, "length": 0, "abort": 0, "error": 6}
    found = total.snapshot()
    assert found["request_prompt_tokens"]["sum"] == 16
    assert found["time_to_first_token_seconds"]["buckets"]["0.25"] == 0
    assert found["time_to_first_token_seconds"]["buckets"]["0.5"] == 4
    assert found["request_prefill_time_seconds"]["sum"] == pytest.approx(1.6)
    assert found["request_inference_time_seconds"]["sum"] == pytest.approx(7.6)


def test_buckets_equal_a_plain_count() -> None:
    rng = random.Random(1)
    histograms = RequestHistograms()
    seen = [(rng.choice((0.3, rng.uniform(0, 20))), rng.randint(1, 600)) for _ in range(300)]
    for seconds, num in seen:
        times = RequestTimes(queued_s=0.0, first_token_s=seconds, last_token_s=seconds + num)
        histograms.observe(times, num_prompt=num, num_output=2 * num, n=2)
    found = histograms.snapshot()
    firsts, lengths = zip(*seen, strict=True)
    values = {
        "time_to_first_token_seconds": list(firsts),
        "e2e_request_latency_seconds": [seconds + num for seconds, num in seen],
        "request_time_per_output_token_seconds": [num / max(1, num - 1) for num in lengths],
        "request_prompt_tokens": list(lengths),
        "request_generation_tokens": [2 * num for num in lengths],
    }
    for name, numbers in values.items():
        assert found[name]["sum"] == pytest.approx(sum(numbers))
        for bound in BOUNDS[name]:
            expected = sum(number <= bound + 1e-12 for number in numbers)
            assert found[name]["buckets"][str(bound)] == expected, (name, bound)
        assert found[name]["buckets"]["+Inf"] == found[name]["count"] == 300
        counts = list(found[name]["buckets"].values())
        assert all(a <= b for a, b in itertools.pairwise(counts))
