"""Two GPUs that share a model, against Hugging Face + PEFT: exactly in fp32, by noise in bf16."""

from pathlib import Path

import pytest
import torch

from helpers.models.bf16_oracles import Oracles, judge
from helpers.models.bf16_oracles import run as run_bf16
from helpers.models.engine_runs import check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import PeftOracle, make_adapters, make_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

VARIANTS = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "no overlap": {"max_steps_in_flight": 1},
    "eager, no overlap": {"enforce_eager": True, "max_steps_in_flight": 1},
    "chunked": {"max_num_seqs": 16, "max_num_batched_tokens": 37},
    "nccl": {"collective_backend": "nccl"},
}


@pytest.mark.parametrize("collective", ["symm_mem", "nccl"])
def test_two_gpus_answer_as_one_worker_would(collective: str, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module", params=["llama3", "qwen3"])
def oracles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    return Oracles(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_gpus_in_bf16_are_right_within_the_noise(oracles: Oracles, variant: str) -> None:
    cases = oracles.cases()
    options = {"in_process": False, "tensor_parallel_size": 2} | VARIANTS[variant]
    outputs, stats = run_bf16(oracles, cases, **options)
    judge(oracles, cases, outputs)
    assert stats["running"] == stats["waiting"] == 0
