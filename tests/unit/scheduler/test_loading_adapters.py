"""A load owns its slot and pages until it is answered, and the pool still makes progress."""

import random

import pytest

from loraplex.scheduler.worker_protocol import AdapterLoaded

from helpers.scheduling.scheduler_harness import Harness

SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 40))]


def run_without_loads(harness: Harness, max_turns: int = 200) -> None:
    """Plan and commit until nothing more happens; answers to loads are withheld."""
    for _ in range(max_turns):
        planned = harness.plan() is not None
        if harness.results:
            harness.commit()
        elif not planned:
            return
    raise AssertionError("it never comes to rest")


def begin_load(harness: Harness, name: str) -> None:
    """Add a request of the adapter and plan until its load is asked for."""
    harness.add(name, [1], adapter=name, max_tokens=2)
    harness.settle()
    harness.plan()
    assert isinstance(harness.events[0], AdapterLoaded)


def test_running_requests_preempt_each_other_beside_a_load() -> None:
    harness = Harness(num_pages=13, max_model_len=28, enable_prefix_caching=False)
    harness.register("x", num_pages=4)
    harness.add("a", [1], max_tokens=27)
    harness.add("b", [2], max_tokens=27)  # 7 pages each; 8 are left beside the load
    harness.plan()
    begin_load(harness, "x")
    run_without_loads(harness)
    assert harness.scheduler.stats()["num_preemptions"] > 0
    assert harness.expected["a"].end is not None
    assert harness.expected["b"].end is not None
    assert harness.expected["x"].end is None
    harness.run()


def test_request_that_needs_the_pages_of_a_load_waits_for_its_answer() -> None:
    harness = Harness(num_pages=10, max_model_len=28, enable_prefix_caching=False)
    harness.register("x", num_pages=4)
    harness.add("a", [1], max_tokens=27)  # 7 of 9 pages
    harness.plan()
    begin_load(harness, "x")
    run_without_loads(harness)
    stats = harness.scheduler.stats()
    assert (stats["running"], stats["pages_adapter"]) == (0, 4)
    assert harness.expected["a"].end is None
    harness.run()  # "a" came first: it evicts the loaded adapter, which is loaded again later
    assert harness.worker.num_loads == 2


def test_failed_load_frees_its_pages_for_those_that_wait() -> None:
    harness = Harness(num_pages=10, max_model_len=28, enable_prefix_caching=False)
    harness.register("x", num_pages=4)
    harness.add("a", [1], max_tokens=27)
    harness.plan()
    harness.add("x", [1], adapter="x", max_tokens=2)
    harness.settle()
    harness.files[next(iter(harness.files))].error = "it is gone"
    harness.plan()
    run_without_loads(harness)
    harness.run()
    assert harness.error_of("x")[0] == "adapter"
    assert len(harness.expected["a"].token_ids) == 27


def test_name_unloaded_during_its_load_frees_the_pages_with_the_answer() -> None:
    harness = Harness(num_pages=10, max_model_len=28)
    harness.register("x", num_pages=4)
    begin_load(harness, "x")
    harness.abort("x")
    harness.scheduler.unload_adapter("x")
    harness.verify()
    assert harness.resident() == {"x"}
    harness.deliver_event()
    assert harness.resident() == set()
    harness.run()


@pytest.mark.parametrize("seed", SEEDS)
def test_random_traffic_over_a_pool_too_small_for_its_loads(seed: int) -> None:
    """Answers to loads come only when nothing else moves; every request still ends as it should."""
    rng = random.Random(seed)
    harness = Harness(
        num_pages=rng.randint(9, 14),
        max_model_len=24,
        max_num_seqs=rng.randint(1, 4),
        max_adapter_slots=rng.randint(1, 3),
        max_steps_in_flight=rng.randint(1, 2),
        enable_prefix_caching=rng.random() < 0.5,
    )
    for name in "xyz":
        harness.register(name, num_pages=rng.randint(1, 3))
    for index in range(20):
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 8))]
        adapter, num_tokens = rng.choice(["", *"xyz"]), rng.randint(1, 16)
        harness.try_add(index, prompt, adapter=adapter, max_tokens=num_tokens)
        if rng.random() < 0.3:
            run_without_loads(harness, max_turns=2000)
    harness.send_commands()
    for _ in range(1000):
        if not harness.scheduler.num_unfinished:
            break
        run_without_loads(harness, max_turns=2000)
        if harness.events:
            harness.deliver_event()
    harness.check_all_ended()
