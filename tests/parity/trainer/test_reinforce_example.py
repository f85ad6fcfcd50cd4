"""The example that trains by policy gradient: its reward rises, with samples of the engine."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loraplex import LLM

from helpers.models.hf_models import make_hf_model, make_tokenizer

SCRIPT = Path(__file__).parents[3] / "examples" / "reinforce.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reinforce", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reward_rises(example: ModuleType, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    make_hf_model("llama", tmp_path, seed=3)
    torch.manual_seed(0)
    policy = example.load_policy(str(tmp_path))
    with LLM(str(tmp_path), device="cpu", dtype="float32", in_process=True, num_pages=512) as llm:
        steps = list(
            example.train(
                llm, policy, example.letter_reward(llm, "e"), steps=14, samples=24, max_tokens=8,
                learning_rate=2e-2,
            )
        )  # fmt: skip
        (row,) = llm.client.list_adapters()
        assert row["kind"] == "lora"
    rewards = [step.reward for step in steps]
    print([round(reward, 2) for reward in rewards])
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
