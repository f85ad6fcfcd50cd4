"""Weighted mixes against PEFT's add_weighted_adapter(combination_type="cat"), token for token.

fp32 on the CPU. The batches hold base rows, single adapters and mixes side by side.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import LLM, LoRAMix, LoRARequest
from loraplex.engine.errors import AdapterError, ClientError, UnknownAdapterError

from helpers.models.engine_runs import check, greedy
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import Case, PeftOracle, adapter_names, make_adapters, make_cases

MIXES = {
    "two": {"r8-qkvo": 0.7, "r64-kd": 0.3},
    "negative": {"r1-q": 1.0, "r17-pattern": -0.5},
    "four": {"r1-q": 0.5, "r8-qkvo": 1.0, "r17-pattern": 0.25, "r64-kd": 1.5},
    "scaled": {"r8-qkvo": 0.5},
    "five": dict.fromkeys(("r1-q", "r8-qkvo", "r16-all-rslora", "r17-pattern", "r64-kd"), 0.2),
}
ALL = ("", "r4-regex", "r64-kd", *MIXES)
NAMED = "blend"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    root = tmp_path_factory.mktemp("mixes")
    model = make_hf_model("llama3", root / "base", seed=3)
    make_adapters(model, root / "adapters")
    oracle = PeftOracle(root / "base", root / "adapters", model=model)
    for name, weights in MIXES.items():
        names = list(weights)
        if len(names) == 1:  # PEFT adds nothing up then
            names, weights = names * 2, {names[0]: weights[names[0]] / 2}
        values = [weights[part] for part in names]
        oracle.model.add_weighted_adapter(names, values, name, combination_type="cat")
    return oracle


def lora_of(name: str) -> LoRARequest | LoRAMix | None:
    if name in MIXES:
        return LoRAMix(MIXES[name].items())
    return LoRARequest(name) if name else None


def answer(llm: LLM, cases: list[Case]) -> list[Any]:
    return llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases],
        greedy(),
        lora_request=[lora_of(case.adapter) for case in cases],
        use_tqdm=False,
    )


def make_llm(oracle: PeftOracle, **options: Any) -> LLM:
    values = {
        "device": "cpu", "dtype": "float32", "in_process": True, "skip_tokenizer_init": True,
        "max_num_seqs": 16, "max_num_batched_tokens": 2048, "num_pages": 2048,
    }  # fmt: skip
    adapters = {name: str(oracle.adapters / name) for name in adapter_names()}
    return LLM(str(oracle.base), adapters=adapters, **(values | options))


@pytest.fixture(scope="module")
def llm(oracle: PeftOracle) -> Iterator[LLM]:
    mix = ",".join(f"{name}:{weight}" for name, weight in MIXES["two"].items())
    with make_llm(oracle, adapter_mixes=((NAMED, mix),)) as llm:
        yield llm


def test_one_batch_of_everything(llm: LLM, oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (1, 17, 64), ALL)
    check(oracle, cases, answer(llm, cases))


def test_prefix_cache_is_keyed_by_contents_and_weights(llm: LLM, oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (100,), ALL)
    answer(llm, cases)
    outputs = answer(llm, cases)
    check(oracle, cases, outputs)
    assert {output.num_cached_tokens for output in outputs} == {96}
    other = LoRAMix([("r64-kd", 0.3), ("r8-qkvo", 0.7)])  # the order does not count
    (again,) = llm.generate([{"prompt_token_ids": cases[0].prompt}], greedy(), lora_request=other)
    assert again.num_cached_tokens == 96
    for parts in ([("r8-qkvo", 0.7), ("r64-kd", 0.4)], [("r8-qkvo", 0.7), ("r1-q", 0.3)]):
        (new,) = llm.generate(
            [{"prompt_token_ids": cases[0].prompt}], greedy(), lora_request=LoRAMix(parts)
        )
        assert new.num_cached_tokens == 0


def test_a_named_mix_is_the_mix(llm: LLM, oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (30,), ("two",))
    prompts = [{"prompt_token_ids": case.prompt} for case in cases]
    outputs = llm.generate(prompts, greedy(), lora_request=LoRARequest(NAMED))
    check(oracle, cases, outputs)
    with pytest.raises(ClientError, match="is a mix"):
        llm.client.load_adapter(NAMED, str(oracle.adapters / "r1-q"))


def test_a_mix_of_one_with_weight_1_is_the_adapter_bit_for_bit(
    llm: LLM, oracle: PeftOracle
) -> None:
    prompt = [{"prompt_token_ids": make_cases(oracle, (40,), ("",))[0].prompt}]
    params = greedy(logprobs=3, prompt_logprobs=1)
    mix = LoRAMix(["r17-pattern"])
    (alone,) = llm.generate(prompt, params, lora_request=LoRARequest("r17-pattern"))
    (mixed,) = llm.generate(prompt, params, lora_request=mix)
    assert alone.outputs[0].logprobs == mixed.outputs[0].logprobs
    assert alone.prompt_logprobs == mixed.prompt_logprobs


@pytest.mark.parametrize("case", ["chunks", "pages", "slots"])
def test_scheduling(oracle: PeftOracle, case: str) -> None:
    """Chunked prompts; preemption; fewer adapter slots than adapters."""
    options: dict[str, Any] = {
        "chunks": {"max_num_seqs": 8, "max_num_batched_tokens": 11},
        "pages": {"block_tokens": 4, "num_pages": 310, "enable_prefix_caching": False},
        "slots": {"max_adapter_slots": 5, "max_num_seqs": 4},
    }[case]
    cases = make_cases(oracle, (36, 41, 50), ALL)
    with make_llm(oracle, **options) as llm:
        for _ in range(3 if case == "pages" else 1):
            check(oracle, cases, answer(llm, cases))
        stats = llm.client.stats()
        assert stats["running"] == stats["waiting"] == 0
        assert case != "pages" or stats["num_preemptions"] > 0
        assert case != "slots" or stats["num_adapter_unloads"] > 0


def test_any_failing_adapter_fails_the_request_by_name(
    llm: LLM, oracle: PeftOracle, tmp_path: Path
) -> None:
    prompt = [{"prompt_token_ids": [1, 2, 3]}]
    with pytest.raises(UnknownAdapterError, match="'nobody'"):
        llm.generate(prompt, greedy(), lora_request=LoRAMix([("r1-q", 0.5), ("nobody", 0.5)]))
    (tmp_path / "empty").mkdir()
    broken = LoRARequest("broken", 1, str(tmp_path / "empty"))
    with pytest.raises((AdapterError, ClientError), match="broken"):
        llm.generate(prompt, greedy(), lora_request=LoRAMix([("r1-q", 0.5), (broken, 0.5)]))
    (output,) = llm.generate(prompt, greedy(), lora_request=LoRAMix(["r1-q", "r8-qkvo"]))
    assert len(output.outputs[0].token_ids) == 10


@pytest.mark.e2e
def test_two_ranks(oracle: PeftOracle) -> None:
    cases = make_cases(oracle, (1, 17, 64), ALL)
    with make_llm(oracle, in_process=False, tensor_parallel_size=2) as llm:
        check(oracle, cases, answer(llm, cases))
