"""A profile of the worker's steps: its lines against the steps that were run, its timelines."""

import json
from pathlib import Path

import pytest

from loraplex.engine.config import EngineConfig, ModelConfig, ProfileConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.worker.worker import Worker
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.models.hf_models import make_hf_model
from helpers.running.step_driver import Sequence, StepDriver


def make_config(root: Path, profile: ProfileConfig) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(root), device="cpu"),
        memory=MemoryConfig(block_tokens=16, num_pages=64, max_lora_rank=8, max_adapter_slots=2),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=256),
        profile=profile,
    )


def test_a_line_for_each_step_and_a_timeline_of_some(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path / "base", seed=1)
    folder = tmp_path / "made" / "profile"
    options = ProfileConfig(profile_dir=str(folder), profile_steps=2, profile_every=5)
    worker = Worker(make_config(tmp_path / "base", options))
    driver = StepDriver(worker, block_tokens=16, max_num_seqs=4)
    driver.run([Sequence(list(range(3, 23))), Sequence(list(range(3, 10)))], 12, chunk=16)
    worker.close()

    lines = [json.loads(line) for line in (folder / "steps-rank0.jsonl").open()]
    assert [line["step_id"] for line in lines] == list(range(len(lines)))
    assert [line["num_rows"] for line in lines[:3]] == [2, 2, 2]
    assert [line["num_tokens"] for line in lines[:3]] == [16 + 7, 4 + 1, 1 + 1]
    assert all(line["step_us"] > 0 and line["launch_us"] >= line["step_us"] for line in lines)
    starts = [line["at_us"] for line in lines]
    assert starts == sorted(starts)

    timelines = sorted(folder.glob("timeline-rank0-*.json"))
    assert len(timelines) - len(lines) // 5 in (0, 1)  # one may be under way at the end
    names = {event.get("name") for event in json.loads(timelines[0].read_text())["traceEvents"]}
    assert "aten::linear" in names


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path / "base", seed=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write profiles"):
        Worker(make_config(tmp_path / "base", ProfileConfig(profile_dir=str(tmp_path / "file"))))
    with pytest.raises(ValueError, match="profile_dir"):
        ProfileConfig(profile_steps=2)
