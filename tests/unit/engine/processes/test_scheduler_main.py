from array import array

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.engine.processes.scheduler_main import engine_info, make_scheduler
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.request import Request
from loraplex.scheduler.worker_protocol import WorkerReady

from helpers.fakes.fake_model import sampling_spec


@pytest.mark.parametrize(
    ("device", "max_num_seqs", "limit", "num_tokens"),
    [
        ("cuda:0", 64, 8192, 3000),
        ("cpu", 64, 8192, 512),
        ("cpu", 600, 8192, 600),
        ("cpu", 64, 100, 100),
    ],
)
def test_steps_on_a_cpu_are_short(
    device: str, max_num_seqs: int, limit: int, num_tokens: int
) -> None:
    """A step of a whole prompt of 6,000 tokens holds up everybody else for seconds there."""
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=limit)
    config = EngineConfig(scheduler=scheduler)
    ready = WorkerReady(0, 500, 64, 1, 4000, 384, device, "torch", "torch")
    planner = make_scheduler(config, engine_info(config, [ready]))
    prompt = array("i", [1] * 3000)
    planner.add(Request(request_id=1, prompt_token_ids=prompt, sampling=sampling_spec()))
    plan = planner.plan()
    assert plan is not None
    assert sum(plan.num_tokens) == num_tokens
