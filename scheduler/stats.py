"""Counters of one scheduler since its start."""

from dataclasses import dataclass, field, fields
from typing import Any

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.request import FINISH_REASONS
from loraplex.scheduler.running_requests import RunningRequests
from loraplex.scheduler.statistics.bucket_counts import BucketCounts
from loraplex.scheduler.waiting_queue import WaitingQueue

STEP_TOKENS = tuple(map(float, (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)))
"""Bounds of the histogram of the tokens that a step feeds to the model."""


@dataclass(slots=True)
class SchedulerStats:
    """Plain counts; microseconds are the workers' own."""

    num_steps: int = 0
    step_us: int = 0
    steps_by_kernels: dict[str, int] = field(default_factory=dict)  # see StepResult.kernels
    step_tokens: BucketCounts = field(default_factory=lambda: BucketCounts(STEP_TOKENS))
    busy_us: int = 0  # of steps before which requests were running already
    idle_us: int = 0  # of the GPU, before those steps
    num_scheduled_tokens: int = 0  # fed to the model, recomputed ones included
    num_generated_tokens: int = 0
    num_dropped_tokens: int = 0  # sampled after their request had ended
    num_drafted_tokens: int = 0  # fed to the model to be verified
    num_accepted_tokens: int = 0  # of those, equal to the token that was sampled
    num_requests: int = 0  # accepted
    num_refused: int = 0
    num_preemptions: int = 0
    num_deadline_drops: int = 0  # failed because the first token would have been late
    prefix_query_tokens: int = 0  # of admitted requests that read the prefix cache
    prefix_hit_tokens: int = 0
    num_adapter_loads: int = 0
    num_adapter_prefetches: int = 0  # of those, begun before the request could start
    num_adapter_load_failures: int = 0
    num_adapter_unloads: int = 0  # evicted, or no longer wanted
    adapter_load_us: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))

    def snapshot(self) -> dict[str, Any]:
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return values | {
            "steps_by_kernels": dict(self.steps_by_kernels),
            "step_tokens": self.step_tokens.snapshot(),
            "finished": dict(self.finished),
        }


def describe_load(
    memory: PageManager, running: RunningRequests, waiting: WaitingQueue, num_in_flight: int
) -> dict[str, int]:
    """Returns the present load, the use of pages and the evictions as plain values."""
    pages = memory.num_owned()
    num_bindings = [len(request.bindings) for request in running]
    return {
        "running": len(running),
        "running_bindings": sum(num_bindings),  # adapters of running requests
        "running_mixes": sum(number > 1 for number in num_bindings),
        "waiting": len(waiting),
        "waiting_for_adapter": waiting.num_parked,
        "steps_in_flight": num_in_flight,
        "num_pages": memory.blocks.num_usable,
        "pages_free": pages["free"],
        "pages_kv": pages["kv"],
        "pages_prefix": pages["prefix"],
        "pages_adapter": pages["adapter"],
        "pages_adapter_idle": memory.adapters.num_idle_pages,
        "num_adapter_evictions": memory.num_adapter_evictions,
        "num_prefix_evictions": memory.num_prefix_evictions,
        "num_resident_adapters": len(memory.adapters),
    }
