"""Several ranks on the CPU, over gloo and real processes, against Hugging Face + PEFT in fp32."""

from pathlib import Path

import pytest

from helpers.models.engine_runs import check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import PeftOracle, make_adapters, make_cases

CASES = (
    ("llama3", 2),  # scaled RoPE
    ("qwen2", 2),  # biases
    ("qwen3", 2),  # norms of query and key heads
    ("llama", 4),  # fewer KV heads than ranks
)


@pytest.mark.parametrize(("architecture", "world_size"), CASES)
def test_ranks_answer_as_one_worker_would(
    architecture: str, world_size: int, tmp_path: Path
) -> None:
    model = make_hf_model(architecture, tmp_path / "base", seed=3)
    make_adapters(model, tmp_path / "adapters")
    oracle = PeftOracle(tmp_path / "base", tmp_path / "adapters", model=model)
    cases = make_cases(oracle, lengths=(1, 17, 64))
    outputs, stats = run(
        oracle,
        cases,
        repeat=2,  # the second time with a warm prefix cache
        in_process=False,
        tensor_parallel_size=world_size,
        max_num_batched_tokens=40,  # prompts run in chunks
        max_num_seqs=8,
    )
    check(oracle, cases, outputs)
    assert stats["prefix_hit_tokens"] > 0
