"""Profiles a worker's steps: a line for each step, and timelines of some."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from loraplex.engine.config import ProfileConfig
from loraplex.engine.errors import ConfigError
from loraplex.scheduler.worker_protocol import StepPlan, StepResult

WARM_UP_STEPS = 2
"""Steps recorded and dropped before each timeline: they include the profiler's own start."""


class StepProfile:
    """Writes steps-rankN.jsonl and, for Chrome's or Perfetto's viewer, timeline-rankN-STEP.json.

    A line has the step's id, rows and tokens, what ran (see StepResult.kernels), `step_us` and
    `idle_us` of the GPU, `launch_us` that the CPU took to enqueue it, and `at_us` when that began,
    by the worker's clock.

    Raises:
        ConfigError: the directory cannot be written.
    """

    def __init__(self, config: ProfileConfig, rank: int) -> None:
        self._folder = folder = Path(config.profile_dir)
        self._rank = rank
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = (folder / f"steps-rank{rank}.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write profiles to {folder}: {error}") from None
        self._launched: dict[int, dict[str, Any]] = {}
        self._timelines: profile | None = None
        if config.profile_steps:
            wait = max(0, config.profile_every - config.profile_steps - WARM_UP_STEPS)
            self._timelines = profile(
                activities=[
                    ProfilerActivity.CPU,
                    *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
                ],
                schedule=schedule(wait=wait, warmup=WARM_UP_STEPS, active=config.profile_steps),
                on_trace_ready=self._export,
            )
            self._timelines.start()

    def launched(self, plan: StepPlan, started_at: float) -> None:
        """Record that a step is enqueued; that began at `started_at` (time.perf_counter)."""
        now = time.perf_counter()
        self._launched[plan.step_id] = {
            "step_id": plan.step_id,
            "num_rows": len(plan.slots),
            "num_tokens": sum(plan.num_tokens),
            "at_us": int(started_at * 1e6),
            "launch_us": int((now - started_at) * 1e6),
        }
        if self._timelines is not None:
            self._timelines.step()

    def finished(self, result: StepResult) -> None:
        line = self._launched.pop(result.step_id)
        line |= {"kernels": result.kernels, "step_us": result.step_us, "idle_us": result.idle_us}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """End the recording. A profiler that still runs fails when the process ends."""
        if self._timelines is not None:
            self._timelines.stop()
        self._lines.close()

    def _export(self, timelines: profile) -> None:
        name = f"timeline-rank{self._rank}-{timelines.step_num}.json"
        timelines.export_chrome_trace(str(self._folder / name))
