"""Planning must not depend on how many requests wait: counted in calls of Python functions.

Times are measured by benchmarks/scheduler_step.py.
"""

from array import array
from typing import Any

import pytest

from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import POLICY_NAMES, SchedulerConfig
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import Request
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    int_array,
)

from helpers.fakes.fake_model import sampling_spec
from helpers.running.calls import count_calls


def make_scheduler(num_pages: int, **options: Any) -> Scheduler:
    return Scheduler(
        config=SchedulerConfig(ttft_slo_s=1e4, **options),
        memory=MemoryConfig(),
        num_pages=num_pages,
        max_model_len=4096,
        base_fingerprint="base",
    )


def decode_calls(num_rows: int, num_waiting: int) -> list[int]:
    """Calls of plan() and commit() together, in steps that decode and start nothing."""
    scheduler = make_scheduler(40_000, max_num_seqs=num_rows, max_steps_in_flight=1)
    for index in range(num_rows + num_waiting):
        prompt = array("i", [(index * 7 + place) % 1000 for place in range(20)])
        spec = sampling_spec(max_tokens=1000, stop_token_ids=(2,))
        scheduler.add(Request(index, prompt, spec))

    def step() -> StepPlan:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.commit(StepResult(plan.step_id, int_array([5] * sum(plan.samples))))
        return plan

    counts = []
    for _ in range(40):
        plan, num_calls = count_calls(step)
        if not plan.new_requests and not plan.page_ids:
            counts.append(num_calls)
    assert len(counts) > 20
    return sorted(counts)


def test_a_decode_step_makes_few_calls_a_row() -> None:
    few, many = decode_calls(32, 0), decode_calls(256, 0)
    assert (many[10] - few[10]) / (256 - 32) <= 6  # appends and lengths; no function of our own


def test_waiting_requests_cost_a_full_batch_nothing() -> None:
    assert decode_calls(32, 3000)[10] <= decode_calls(32, 100)[10] + 50


def answer_adapters(scheduler: Scheduler) -> None:
    """Inspections and loads succeed at once."""
    for command in scheduler.take_commands():
        if isinstance(command, InspectAdapter):
            name, path = command.name, command.path
            scheduler.on_adapter_inspected(
                AdapterInspected(name, path, content_hash=name, num_pages=2)
            )
        elif isinstance(command, LoadAdapter):
            scheduler.on_adapter_loaded(AdapterLoaded(command.adapter_slot, command.content_hash))


def calls_a_start(policy: str, num_waiting: int) -> float:
    """Calls of plan() for each request that it starts, when short answers free some seats a step.

    There are as many tenants as requests, and 50 adapters.
    """
    scheduler = make_scheduler(20_000, policy=policy, max_num_seqs=64, max_steps_in_flight=1)
    for index in range(50):
        scheduler.register_adapter(str(index), AdapterSource.at(str(index)))
    for index in range(num_waiting):
        scheduler.add(
            Request(
                index,
                array("i", [index % 1000] * 20),
                sampling_spec(max_tokens=5 + index * 7 % 40),
                adapter=str(index * 11 % 50),
                salt=str(index),
                priority=index % 3,
            )
        )
    answer_adapters(scheduler)
    total = num_started = 0
    for _ in range(60):
        plan, num_calls = count_calls(scheduler.plan)
        answer_adapters(scheduler)
        if plan is None:
            continue
        if len(plan.slots) >= 50 and len(plan.new_requests) < 12:
            total += num_calls
            num_started += len(plan.new_requests)
        scheduler.commit(StepResult(plan.step_id, int_array([5] * sum(plan.samples))))
    assert num_started > 50
    return total / num_started


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_start_costs_about_the_same_however_many_wait(policy: str) -> None:
    """Sorted lists are searched in logarithmic time, and "abort" looks at 256 samples at most."""
    assert calls_a_start(policy, 4000) <= 1.5 * calls_a_start(policy, 1000) + 100
