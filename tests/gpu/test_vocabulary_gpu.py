"""LoRA on embedding and head on a GPU in bf16, beside plain LoRA and base rows, against PEFT."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models.bf16_oracles import STRENGTH, Oracles, judge, run
from helpers.models.peft_adapters import make_adapter

VARIANTS = {"plain": {}, "chunked": {"max_num_seqs": 16, "max_num_batched_tokens": 37}}
TARGETS = {"head": ["q_proj", "lm_head"], "embedding": ["embed_tokens", "down_proj"]}


def make_oracles(root: Path, device: str) -> Oracles:
    """Returns the oracles of a model whose adapters are two plain ones and those of TARGETS."""
    oracles = Oracles("qwen3", root, device=device)
    model = AutoModelForCausalLM.from_pretrained(oracles.path, dtype=torch.float32)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        folder = oracles.adapters / name
        make_adapter(model, folder, r=8, alpha=16, targets=targets, seed=seed, strength=STRENGTH)
    names = ["r8-qkvo", "r17-pattern", *TARGETS]
    oracles.names = oracles.judge.names = oracles.exact.names = names
    return oracles


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.long)
    ],
)  # fmt: skip
def oracles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    return make_oracles(tmp_path_factory.mktemp("vocabulary"), request.param)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(oracles: Oracles, variant: str) -> None:
    cases = oracles.cases()
    outputs, stats = run(oracles, cases, **VARIANTS[variant])
    judge(oracles, cases, outputs)
    assert stats["running"] == stats["waiting"] == 0
