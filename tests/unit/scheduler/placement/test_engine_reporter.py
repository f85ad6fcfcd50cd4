"""An engine's reports: its load, and the adapters that changed since the last report."""

from loraplex.scheduler.placement.engine_reporter import EngineReporter

from helpers.scheduling.scheduler_harness import Harness


def make(harness: Harness) -> EngineReporter:
    return EngineReporter(harness.scheduler, load_seconds=0.5)


def test_reports_give_load_and_changes_of_adapters() -> None:
    harness = Harness(num_pages=64, max_num_batched_tokens=16)
    reporter = make(harness)
    first = reporter.report(num_received=0, now=0.0)
    assert (first.running, first.waiting, first.waiting_tokens) == (0, 0, 0)
    assert first.free_pages == first.num_pages == 63

    harness.register("a")
    harness.add("long", list(range(20)), max_tokens=2)
    harness.add("lora", [1, 2, 3], adapter="a", max_tokens=2)
    harness.plan()
    loading = reporter.report(num_received=2, now=1.0)
    assert (loading.running, loading.waiting) == (1, 1)
    assert loading.waiting_tokens == 20 + 3  # one step of 16 tokens is planned, not computed
    assert not loading.adapters

    harness.run()
    after = reporter.report(num_received=2, now=3.0)
    assert list(after.adapters.values()) == [0.0]
    assert (after.running, after.waiting, after.waiting_tokens) == (0, 0, 0)
    assert after.steps_per_second > 0
    assert after.prefill_tokens_per_second > 0
    unchanged = reporter.report(num_received=2, now=4.0)
    assert not unchanged.adapters and not unchanged.dropped_adapters

    harness.scheduler.unload_adapter("a")
    gone = reporter.report(num_received=2, now=5.0)
    assert gone.dropped_adapters == list(after.adapters)
