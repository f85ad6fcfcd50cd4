"""Two GPUs that share a model, in fp32, against Hugging Face + PEFT."""

from pathlib import Path

import pytest
import torch

from helpers.models.engine_runs import check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import PeftOracle, make_adapters, make_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("collective", ["symm_mem", "nccl"])
def test_two_gpus_answer_as_one_worker_would(collective: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = make_hf_model("llama3", tmp_path / "base", seed=3)
    make_adapters(model, tmp_path / "adapters")
    oracle = PeftOracle(tmp_path / "base", tmp_path / "adapters", model=model)
    cases = make_cases(oracle, lengths=(1, 17, 64, 300))
    outputs, _ = run(
        oracle,
        cases,
        device="cuda",
        in_process=False,
        tensor_parallel_size=2,
        collective_backend=collective,
        attention_backend="torch",
        lora_backend="triton",
        max_num_batched_tokens=512,
    )
    check(oracle, cases, outputs)
