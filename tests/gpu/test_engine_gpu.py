"""The engine on a GPU in bf16, against Hugging Face + PEFT; see helpers/models/bf16_oracles.py."""

import pytest

from loraplex.backends import registry

from helpers.models.bf16_oracles import MODELS, NUM_NEW_TOKENS, Oracles, judge, run
from helpers.models.peft_oracle import tight_num_pages

pytestmark = pytest.mark.gpu

BACKENDS = [
    ("torch", "torch"), ("xformers", "cupy"), ("flashinfer", "torch"), ("flashinfer", "triton"),
    ("flashinfer", "hybrid"),
]  # fmt: skip
VARIANTS = {
    "plain": {},
    "chunked": {"max_num_seqs": 16, "max_num_batched_tokens": 37},
    "eager": {"enforce_eager": True, "max_steps_in_flight": 1},
}


@pytest.fixture(scope="module", params=MODELS)
def oracles(request, tmp_path_factory):
    return Oracles(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(oracles, variant):
    cases = oracles.cases()
    outputs, stats = run(oracles, cases, **VARIANTS[variant])
    judge(oracles, cases, outputs)
    assert stats["running"] == stats["waiting"] == 0


def test_preemption(oracles):
    cases = oracles.cases()
    _, stats = run(oracles, cases[:: len(oracles.names) + 1] + cases[: len(oracles.names) + 1])
    num_pages = tight_num_pages(cases, stats["adapter_pages"], num_new_tokens=NUM_NEW_TOKENS)
    # Again, because the first time requests may be done before the next adapter has arrived.
    outputs, stats = run(oracles, cases, repeat=3, num_pages=num_pages)
    judge(oracles, cases, outputs)
    assert stats["num_preemptions"] > 0


@pytest.mark.parametrize(("attention", "lora"), BACKENDS)
def test_backends(oracles, attention, lora):
    for op, name in (("attention", attention), ("lora", lora)):
        reason = next(b for b in registry.list_backends(op) if b.name == name).probe()
        if reason:
            pytest.skip(f"{name}: {reason}")
    cases = oracles.cases()
    outputs, _ = run(oracles, cases, attention_backend=attention, lora_backend=lora)
    judge(oracles, cases, outputs)
