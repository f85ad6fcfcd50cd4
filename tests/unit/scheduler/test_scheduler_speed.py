"""A step is planned every few milliseconds; the bar here only catches a change of order."""

import statistics
import time
from array import array
from collections import deque

import pytest

from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import POLICY_NAMES, SchedulerConfig
from loraplex.scheduler.request import Request
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    StepResult,
    int_array,
)

from helpers.fakes.fake_worker import sampling_spec


@pytest.mark.parametrize(("num_waiting", "num_pages"), [(0, 20_000), (10_000, 6_500)])
def test_step_of_256_decoding_requests_costs_little(num_waiting: int, num_pages: int) -> None:
    scheduler = Scheduler(
        config=SchedulerConfig(max_num_seqs=256),
        memory=MemoryConfig(),
        num_pages=num_pages,
        max_model_len=4096,
        base_fingerprint="base",
    )
    for index in range(256 + num_waiting):
        prompt = array("i", [(index * 7 + place) % 1000 for place in range(300)])
        scheduler.add(
            Request(
                request_id=index,
                prompt_token_ids=prompt,
                sampling=sampling_spec(max_tokens=1000, stop_token_ids=(2,)),
            )
        )
    in_flight: deque[tuple[int, int]] = deque()
    seconds: list[float] = []
    for _ in range(120):
        start = time.perf_counter()
        plan = scheduler.plan()
        if plan is not None:
            in_flight.append((plan.step_id, sum(plan.samples)))
        if plan is None or len(in_flight) == 2:
            step_id, num_sampled = in_flight.popleft()
            scheduler.commit(StepResult(step_id, int_array([5] * num_sampled)))
            if num_sampled >= 250:
                seconds.append(time.perf_counter() - start)
    assert len(seconds) > 50
    assert statistics.median(seconds) < 0.005, "it was 0.0006 on a slow machine"


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


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_plan_with_16384_waiting_and_seats_to_fill_costs_little(policy: str) -> None:
    """Short answers free some ten seats a step; as many tenants as requests, 300 adapters."""
    scheduler = Scheduler(
        config=SchedulerConfig(policy=policy, ttft_slo_s=1e4),
        memory=MemoryConfig(),
        num_pages=60_000,
        max_model_len=4096,
        base_fingerprint="base",
    )
    for index in range(300):
        scheduler.register_adapter(str(index), str(index))
    for index in range(16_384):
        scheduler.add(
            Request(
                request_id=index,
                prompt_token_ids=array("i", [index % 1000] * 20),
                sampling=sampling_spec(max_tokens=5 + index * 7 % 40),
                adapter=str(index * 11 % 300),
                salt=str(index),
                priority=index % 3,
            )
        )
    answer_adapters(scheduler)
    seconds: list[float] = []
    num_started = 0
    for _ in range(120):
        start = time.perf_counter()
        plan = scheduler.plan()
        elapsed = time.perf_counter() - start
        answer_adapters(scheduler)
        if plan is None:
            continue
        if len(plan.slots) >= 200 and len(plan.new_requests) < 50:
            seconds.append(elapsed)
            num_started += len(plan.new_requests)
        scheduler.commit(StepResult(plan.step_id, int_array([5] * sum(plan.samples))))
    assert len(seconds) > 50
    assert num_started > 300
    assert statistics.median(seconds) < 0.002, "it was 0.0007 on a slow machine"
