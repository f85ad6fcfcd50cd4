"""Adapters in e4m3 against PEFT with adapters whose A and B are rounded to 4 bits, token for token.

Their scales are powers of two, which change no rounding. So the oracle needs none of our code.
"""

import shutil

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
        path = make_adapter(model, root / "rounded" / name, seed=seed, **options)
        shutil.copytree(path, root / "exact" / name)
        tensors = load_file(path / WEIGHTS)
        is_matrix = {key: "lora_A" in key or "lora_B" in key for key in tensors}
        save_file(
            {k: rounded(t) if is_matrix[k] else t for k, t in tensors.items()}, path / WEIGHTS
        )
    oracle = PeftOracle(root / "base", root / "rounded", model=model, names=list(KINDS))
    assert oracle.model is not None  # it is loaded from the rounded files...
    oracle.adapters = root / "exact"  # ...and the engines round for themselves
    return oracle


def test_one_batch_of_all_kinds(oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (1, 17, 64), adapters=("", *KINDS))
    outputs, _ = run(oracle, cases, adapter_dtype="fp8")
    check(oracle, cases, outputs)
    plain, _ = run(oracle, cases)
    answers = [[tuple(o.outputs[0].token_ids) for o in of] for of in (outputs, plain)]
    assert answers[0] != answers[1], "the rounding shows"


@pytest.mark.long
def test_two_ranks(oracle: PeftOracle) -> None:
    """Each rank rounds its part of a row by the whole row."""
    cases = make_cases(oracle, (17, 64), adapters=("", *KINDS))
    outputs, _ = run(oracle, cases, adapter_dtype="fp8", tensor_parallel_size=2, in_process=False)
    check(oracle, cases, outputs)
