"""DoRA and trained biases against PEFT in fp32 on the CPU, token for token.

They run alone, and beside plain LoRA and base rows in one batch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import LLM

from helpers.models.engine_runs import answer, check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import PeftOracle, make_cases

QKV = ["q_proj", "k_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "alpha": 16, "targets": [*QKV, "o_proj"]},
    "dora": {"r": 8, "alpha": 16, "targets": "all-linear", "use_dora": True},
    "dora-some": {
        "r": 5, "alpha": 7, "targets": ["k_proj", "o_proj", "up_proj"], "use_dora": True,
        "use_rslora": True, "rank_pattern": {r"layers.1.mlp.up_proj": 3},
        "layers_to_transform": [0, 2],
    },
    "lora-bias": {"r": 4, "alpha": 12, "targets": [*QKV, "down_proj"], "lora_bias": True},
}  # fmt: skip
NAMES = list(KINDS)
BIASES = {"attention_bias": True, "mlp_bias": True}


def make_oracle(root: Path, architecture: str, **overrides: Any) -> PeftOracle:
    model = make_hf_model(architecture, root / "base", seed=3, **overrides)
    for seed, (name, options) in enumerate(KINDS.items()):
        make_adapter(model, root / "adapters" / name, seed=seed, **options)
    return PeftOracle(root / "base", root / "adapters", model=model, names=NAMES)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    """Answers of a base without biases."""
    return make_oracle(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    """Answers of a base with a bias in every projection, which DoRA must not scale."""
    return make_oracle(tmp_path_factory.mktemp("biases"), "llama", **BIASES)


@pytest.fixture(params=["oracle", "with_biases"])
def each_oracle(request: pytest.FixtureRequest) -> PeftOracle:
    return request.getfixturevalue(request.param)


def test_one_batch_of_all_kinds(each_oracle: PeftOracle) -> None:
    cases = make_cases(each_oracle, (1, 17, 64), adapters=("", *NAMES))
    outputs, _ = run(each_oracle, cases)
    check(each_oracle, cases, outputs)
    answers = {(case.adapter, case.prompt): tuple(o.outputs[0].token_ids)
               for case, o in zip(cases, outputs, strict=True)}  # fmt: skip
    for name in NAMES:
        assert any(answers[name, p] != answers["", p] for a, p in answers if a == name), name


def test_dora_alone(with_biases: PeftOracle) -> None:
    cases = make_cases(with_biases, (1, 40), adapters=("dora",))
    outputs, _ = run(with_biases, cases)
    check(with_biases, cases, outputs)


def test_chunked_prefill(with_biases: PeftOracle) -> None:
    cases = make_cases(with_biases, (3, 70), adapters=("", *NAMES))
    outputs, _ = run(with_biases, cases, max_num_seqs=8, max_num_batched_tokens=11)
    check(with_biases, cases, outputs)


def test_preemption(oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (36, 40, 41, 50), adapters=("", "lora", "dora-some", "lora-bias"))
    options = {"block_tokens": 4, "num_pages": 160, "enable_prefix_caching": False}
    outputs, stats = run(oracle, cases, repeat=3, **options)
    check(oracle, cases, outputs)
    assert stats["num_preemptions"] > 0


def test_prefix_cache_warm(oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (17, 100), adapters=("", *NAMES))
    outputs, _ = run(oracle, cases, repeat=2)
    check(oracle, cases, outputs)
    assert all(
        o.num_cached_tokens == (len(c.prompt) - 1) // 16 * 16
        for o, c in zip(outputs, cases, strict=True)
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_trained_biases_replace_those_of_the_base(tmp_path: Path, use_dora: bool) -> None:
    """PEFT writes such biases into the model that loads the adapter, so it has an oracle alone."""
    base = make_hf_model("qwen2", tmp_path / "base", seed=3)
    options = {"r": 4, "alpha": 8, "targets": [*QKV, "down_proj"], "bias": "lora_only"}
    make_adapter(base, tmp_path / "adapters" / "only", seed=4, use_dora=use_dora, **options)
    make_adapter(base, tmp_path / "adapters" / "lora", seed=5, r=4, alpha=8, targets=QKV)
    biased = PeftOracle(tmp_path / "base", tmp_path / "adapters", names=["only"])
    plain = PeftOracle(tmp_path / "base", tmp_path / "adapters", names=["lora"])
    cases = make_cases(plain, (1, 30), adapters=("", "only", "lora"))
    with LLM(
        str(tmp_path / "base"), device="cpu", dtype="float32", in_process=True,
        skip_tokenizer_init=True, num_pages=512, max_num_seqs=8,
        adapters={name: str(tmp_path / "adapters" / name) for name in ("only", "lora")},
    ) as llm:  # fmt: skip
        outputs = answer(llm, cases)
    for oracle, names in ((biased, ("only",)), (plain, ("", "lora"))):
        pairs = [(c, o) for c, o in zip(cases, outputs, strict=True) if c.adapter in names]
        check(oracle, [case for case, _ in pairs], [output for _, output in pairs])


@pytest.fixture(scope="module")
def two_ranks(with_biases: PeftOracle) -> Iterator[LLM]:
    with LLM(
        str(with_biases.base), device="cpu", dtype="float32", skip_tokenizer_init=True,
        tensor_parallel_size=2, num_pages=512, max_num_seqs=8, max_num_batched_tokens=40,
        adapters={name: str(with_biases.adapters / name) for name in NAMES},
    ) as llm:  # fmt: skip
        yield llm


def test_two_ranks(with_biases: PeftOracle, two_ranks: LLM) -> None:
    cases = make_cases(with_biases, (1, 17, 64), adapters=("", *NAMES))
    check(with_biases, cases, answer(two_ranks, cases))
