"""The scheduler's harness under any policy."""

from dataclasses import replace
from typing import Any

from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.scheduler import Scheduler

from helpers.scheduling.scheduler_harness import Harness

SCHEDULER_OPTIONS = (
    "max_num_seqs", "max_num_batched_tokens", "max_queue_len", "max_steps_in_flight",
)  # fmt: skip


class PolicyHarness(Harness):
    """A Harness whose scheduler has the options of `policy` instead of the default ones."""

    def __init__(self, policy: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        worker = self.worker
        own = {name: options[name] for name in SCHEDULER_OPTIONS if name in options}
        config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_steps_in_flight=1)
        self.scheduler = Scheduler(
            config=replace(config, **own, **policy),
            memory=MemoryConfig(
                block_tokens=worker.block_tokens,
                max_adapter_slots=options.get("max_adapter_slots", 4),
                enable_prefix_caching=options.get("enable_prefix_caching", True),
            ),
            num_pages=options.get("num_pages", 64),
            max_model_len=self.max_model_len,
            base_fingerprint="base",
            clock=lambda: self.now,
        )
