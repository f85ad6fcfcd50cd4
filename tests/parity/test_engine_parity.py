"""The engine against Hugging Face + PEFT on the same weights, in fp32 on the CPU, token for token.

One batch holds base rows and adapters of ranks 1 to 64 and prompts of 1 to 600 tokens. Every
architecture runs that batch. What the scheduler and the processes do to a batch is the same for all
architectures, so those tests run on two: scaled RoPE, and query and key norms.
"""

import pytest

from helpers.models.engine_runs import check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import (
    ADAPTERS,
    PeftOracle,
    adapter_names,
    make_adapters,
    make_cases,
)

ARCHITECTURES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
SCHEDULED = ("llama3", "qwen3")


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """Makes the oracle of an architecture when it is first asked for."""
    made: dict[str, PeftOracle] = {}

    def oracle(architecture: str) -> PeftOracle:
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            model = make_hf_model(architecture, root / "base", seed=3)
            make_adapters(model, root / "adapters")
            made[architecture] = PeftOracle(root / "base", root / "adapters", model=model)
        return made[architecture]

    return oracle


@pytest.fixture(params=SCHEDULED)
def oracle(request, oracles):
    return oracles(request.param)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_batch_of_base_rows_and_all_adapters(oracles, architecture):
    oracle = oracles(architecture)
    cases = make_cases(oracle, lengths=(1, 2, 17, 64))
    cases += make_cases(oracle, lengths=(600,), adapters=("", "r17-pattern"))
    outputs, _ = run(oracle, cases)
    check(oracle, cases, outputs)
    answers = {(case.adapter, case.prompt): tuple(o.outputs[0].token_ids)
               for case, o in zip(cases, outputs, strict=True)}  # fmt: skip
    for name in adapter_names():
        changed = [answers[name, p] != answers["", p] for a, p in answers if a == name]
        assert any(changed), f"{name} changes nothing"


def test_chunked_prefill(oracle):
    cases = make_cases(oracle, lengths=(3, 130))
    outputs, stats = run(oracle, cases, max_num_seqs=8, max_num_batched_tokens=11)
    check(oracle, cases, outputs)
    assert stats["num_steps"] > sum(len(c.prompt) for c in cases) // 11


def test_preemption(oracle):
    small = ("", "r1-q", "r4-regex", "r8-qkvo")  # of 29 pages at most, here
    cases = make_cases(oracle, lengths=(36, 40, 41, 50), adapters=small)
    options = {"block_tokens": 4, "num_pages": 150, "enable_prefix_caching": False}
    # Again, because the first time each adapter's requests may be done before the next has arrived.
    outputs, stats = run(oracle, cases, repeat=3, **options)
    check(oracle, cases, outputs)
    assert stats["num_preemptions"] > 0


def test_prefix_cache_warm(oracle):
    cases = make_cases(oracle, lengths=(16, 17, 100))
    outputs, stats = run(oracle, cases, repeat=2)
    check(oracle, cases, outputs)
    assert all(
        o.num_cached_tokens == (len(c.prompt) - 1) // 16 * 16
        for o, c in zip(outputs, cases, strict=True)
    )


def test_one_step_in_flight(oracle):
    cases = make_cases(oracle, lengths=(5, 70))
    outputs, _ = run(oracle, cases, max_steps_in_flight=1)
    check(oracle, cases, outputs)


@pytest.mark.e2e
def test_through_the_processes(oracles):
    oracle = oracles("qwen3")
    cases = make_cases(oracle, lengths=(1, 17, 200))
    outputs, _ = run(oracle, cases, in_process=False)
    check(oracle, cases, outputs)


def test_the_adapters_cover_what_peft_can_say():
    ranks = [rank for spec in ADAPTERS.values() for rank in spec.ranks]
    assert min(ranks) == 1 and max(ranks) == 64 and len(ADAPTERS) >= 6
