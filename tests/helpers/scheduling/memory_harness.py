"""The scheduler's harness with any options of memory and policy."""

from typing import Any

from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.scheduler import Scheduler

from helpers.scheduling.scheduler_harness import Harness

MEMORY_OPTIONS = ("block_tokens", "max_adapter_slots", "enable_prefix_caching")
SCHEDULER_OPTIONS = (
    "max_num_seqs", "max_num_batched_tokens", "max_queue_len", "max_steps_in_flight",
)  # fmt: skip


class MemoryHarness(Harness):
    """A Harness whose scheduler also has the options `memory` and `policy`."""

    def __init__(
        self,
        memory: dict[str, Any],
        policy: dict[str, Any] | None = None,
        *,
        max_adapter_pages: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        own = {
            "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_steps_in_flight": 1,
        } | {name: options[name] for name in SCHEDULER_OPTIONS if name in options}  # fmt: skip
        pool = {"block_tokens": 4, "max_adapter_slots": 4} | {
            name: options[name] for name in MEMORY_OPTIONS if name in options
        }
        self.scheduler = Scheduler(
            config=SchedulerConfig(**own, **(policy or {})),
            memory=MemoryConfig(**pool, **memory),
            num_pages=options.get("num_pages", 64),
            max_model_len=self.max_model_len,
            base_fingerprint="base",
            max_adapter_pages=max_adapter_pages,
            clock=lambda: self.now,
        )
