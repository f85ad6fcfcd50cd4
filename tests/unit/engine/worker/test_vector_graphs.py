"""Decode graphs of steps with DoRA, against the same steps run eagerly."""

from pathlib import Path

import pytest
import torch

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.fakes.fake_graphs import FakeRecorder, allow_graphs
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.running.step_runner import STEPS, StepRunner, make_sequences


def test_graphs_equal_the_eager_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_hf_model("qwen2", tmp_path / "base", seed=4, num_hidden_layers=2)
    make_adapter(model, tmp_path / "a", r=3, alpha=6, targets=["q_proj", "down_proj"])
    make_adapter(model, tmp_path / "b", r=5, alpha=8, targets="all-linear", use_dora=True, seed=1)
    config = EngineConfig(
        model=ModelConfig(model=str(tmp_path / "base"), device="cpu", dtype="float32"),
        memory=MemoryConfig(block_tokens=8, num_pages=150, max_lora_rank=32, max_adapter_slots=4),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=96),
    )
    eager = StepRunner(config, tmp_path)
    allow_graphs(monkeypatch, FakeRecorder())
    graphs = StepRunner(config, tmp_path, capture=True)
    runs = [(runner, make_sequences(runner.slots)) for runner in (eager, graphs)]
    decodes = [("xyzwuv", 1), ("yw", 1), ("zv", 1), ("yz", 1), ("xzwuv", 1)]
    for names, chunk in (*STEPS, *decodes):
        for runner, sequences in runs:
            runner.step([sequences[name] for name in names], chunk)
        torch.testing.assert_close(graphs.pool[:, 1:], eager.pool[:, 1:], atol=2e-5, rtol=0)
    assert graphs.kernels[-len(decodes) :] == ["graph+bmm"] * len(decodes)
    kinds = {kind for _, kind, _ in graphs.used}
    assert kinds and not any(str(kind).endswith("vectors") for kind in kinds)  # these run eagerly
    assert "eager+bmm" in graphs.kernels
    assert {kernels.split("+")[0] for kernels in eager.kernels} == {"eager"}
