"""Adapters in e4m3 against PEFT, token for token.

A and B have 4 bits in the files. So the engine rounds nothing, and the oracle needs none of our
code. tests/unit/engine/adapters/packing judges the rounding.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models.engine_runs import check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import PeftOracle, make_cases

KINDS = {
    "lora": {"r": 8, "alpha": 16, "targets": "all-linear"},
    "some": {"r": 5, "alpha": 7, "targets": ["k_proj", "o_proj", "up_proj"], "use_rslora": True},
    "dora": {"r": 4, "alpha": 8, "targets": ["q_proj", "down_proj"], "use_dora": True},
}
WEIGHTS = "adapter_model.safetensors"


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Returns the nearest numbers of 4 bits; a tie goes to the even one."""
    mantissa, exponent = weight.double().frexp()
    return torch.ldexp((mantissa * 16).round() / 16, exponent).to(weight.dtype)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    root = tmp_path_factory.mktemp("e4m3")
    model = make_hf_model("llama", root / "base", seed=3, attention_bias=True)
    for seed, (name, options) in enumerate(KINDS.items()):
        path = make_adapter(model, root / "adapters" / name, seed=seed, **options)
        tensors = load_file(path / WEIGHTS)
        is_matrix = {key: "lora_A" in key or "lora_B" in key for key in tensors}
        save_file(
            {k: rounded(t) if is_matrix[k] else t for k, t in tensors.items()}, path / WEIGHTS
        )
    return PeftOracle(root / "base", root / "adapters", model=model, names=list(KINDS))


def test_one_batch_of_all_kinds(oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (1, 17, 64), adapters=("", *KINDS))
    outputs, _ = run(oracle, cases, adapter_dtype="fp8")
    check(oracle, cases, outputs)


@pytest.mark.long
def test_two_ranks(oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (17, 64), adapters=("", *KINDS))
    outputs, _ = run(oracle, cases, adapter_dtype="fp8", tensor_parallel_size=2, in_process=False)
    check(oracle, cases, outputs)
