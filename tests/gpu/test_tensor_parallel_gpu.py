"""Two GPUs that share a model, against Hugging Face + PEFT: exactly in fp32, by noise in bf16.

-s shows the figures. tests/parity/test_rank_runs.py runs the bf16 checks on a CPU.
"""

from pathlib import Path

import pytest
import torch

from helpers.models.bf16_oracles import Oracles
from helpers.models.engine_runs import check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import PeftOracle, make_adapters, make_cases
from helpers.models.rank_runs import RankRuns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

MODELS = {
    "llama3": {  # half of each size suits the hybrid LoRA backend
        "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
        "intermediate_size": 1008, "vocab_size": 1021,
    },
    "qwen3": {  # half of the feed-forward does not, and Triton's kernels run
        "hidden_size": 384, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 1000, "vocab_size": 1024,
    },
}  # fmt: skip
TWO = {"in_process": False, "tensor_parallel_size": 2}


@pytest.fixture(scope="module", params=["llama3", pytest.param("qwen3", marks=pytest.mark.long)])
def oracles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    root = tmp_path_factory.mktemp(request.param)
    return Oracles(request.param, root, sizes=MODELS[request.param])


@pytest.fixture(scope="module")
def two(oracles: Oracles) -> RankRuns:
    """The engines of two GPUs; the fast one's collective backend is symm_mem."""
    return RankRuns(oracles, **TWO, collective_backend="symm_mem")


def test_two_gpus_are_right_within_the_noise_of_bf16(two: RankRuns) -> None:
    two.judge("two GPUs, plain", two.plain())
    run = two.fast()
    two.judge("two GPUs, fast", run)
    kernels = run.stats["steps_by_kernels"]
    assert any(name.startswith("graph+") for name in kernels)
    assert any(name.startswith("pieces+") for name in kernels)
    assert run.stats["num_preemptions"] > 0


def test_graphs_and_overlap_change_nothing_on_two_gpus(two: RankRuns) -> None:
    plain, fast = two.plain(), two.fast()
    assert all(name.startswith("eager") for name in plain.stats["steps_by_kernels"])
    noise = two.judge("two GPUs, plain", plain)
    two.compare("two GPUs, fast and plain", fast.outputs, plain.outputs, noise)


def test_a_warm_prefix_cache_on_two_gpus(two: RankRuns) -> None:
    plain = two.plain()
    assert all(
        output.num_cached_tokens >= len(case.prompt) // 16 * 16 - 16
        for output, case in zip(plain.warm, two.cases, strict=True)
    )
    noise = two.judge("two GPUs, plain", plain)
    two.compare("two GPUs, warm and cold", plain.warm, plain.outputs, noise)


def test_two_gpus_are_as_near_as_one(two: RankRuns, oracles: Oracles) -> None:
    """One GPU has the same bounds."""
    one = RankRuns(oracles)
    run = one.other("one GPU")
    noise = one.judge("one GPU", run)
    one.compare("two GPUs and one", two.fast().outputs, run.outputs, noise)


def test_nccl_is_right_within_the_noise_of_bf16(oracles: Oracles) -> None:
    two = RankRuns(oracles, **TWO, collective_backend="nccl")
    two.judge("two GPUs, nccl", two.other("nccl"))


@pytest.mark.parametrize("collective", ["symm_mem", pytest.param("nccl", marks=pytest.mark.long)])
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
