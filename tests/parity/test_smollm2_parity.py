"""The packaged model with adapters, against Hugging Face + PEFT in fp32, token for token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.checkpoint.locate import resolve_model

from helpers.models.peft_oracle import Case, PeftOracle, make_adapters, make_cases, tight_num_pages

TRAINED = sorted(
    path.parent.name
    for path in (Path(__file__).parents[2] / "examples" / "adapters").glob("*/adapter_config.json")
)
TRAINED_ROOT = Path(__file__).parents[2] / "examples" / "adapters"
NUM_NEW_TOKENS = 12
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def load_hf(dtype: torch.dtype):
    path = resolve_model("")
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)


@pytest.fixture(scope="module")
def hf_model():
    torch.set_num_threads(2)
    return load_hf(torch.float32)


@pytest.fixture(scope="module")
def oracle(hf_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    make_adapters(hf_model, root)
    return PeftOracle(Path(), root, num_new_tokens=NUM_NEW_TOKENS, model=hf_model)


def answer(oracle: PeftOracle, cases: list[Case], *, repeat: int = 1, **options) -> tuple:
    """The engine's results, all cases submitted at once, and its stats after that."""
    names = sorted({case.adapter for case in cases if case.adapter})
    adapters = {name: str(oracle.adapters / name) for name in names}
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    options = {"pool_bytes": 1 << 29} | options
    with LLM(adapters=adapters, device="cpu", in_process=True, **options) as llm:
        for _ in range(repeat):
            outputs = llm.generate(
                [{"prompt_token_ids": case.prompt} for case in cases],
                params,
                lora_request=[LoRARequest(c.adapter, 1) if c.adapter else None for c in cases],
                use_tqdm=False,
            )
        stats = llm.client.stats()
        stats["adapter_pages"] = sum(a["num_pages"] for a in llm.client.list_adapters())
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == oracle.greedy(case), (
            f"{case.adapter or 'base'}, prompt of {len(case.prompt)} tokens"
        )
    return outputs, stats


def test_random_adapters_of_every_kind(oracle):
    cases = make_cases(oracle, lengths=(1, 19))
    cases += make_cases(oracle, lengths=(600,), adapters=("", "r16-all-rslora"))
    outputs, _ = answer(oracle, cases, repeat=2)
    for case, output in zip(cases, outputs, strict=True):
        assert output.num_cached_tokens == (len(case.prompt) - 1) // 16 * 16


def test_chunked_prefill_and_preemption(oracle):
    small = ("", "r1-q", "r4-regex", "r8-qkvo")
    cases = make_cases(oracle, lengths=(17, 19, 40), adapters=small)
    options = {"block_tokens": 4, "max_num_seqs": 16, "max_num_batched_tokens": 23}
    _, stats = answer(oracle, cases[:4], pool_bytes=1 << 29, **options)
    num_pages = tight_num_pages(
        cases, stats["adapter_pages"], num_new_tokens=NUM_NEW_TOKENS, block_tokens=4
    )
    options["max_num_batched_tokens"] = 97
    _, stats = answer(oracle, cases, pool_bytes=None, num_pages=num_pages, **options)
    assert stats["num_preemptions"] > 0


@pytest.mark.e2e
def test_trained_adapters_through_the_processes(hf_model):
    names = ["", *TRAINED]
    adapters = {name: str(TRAINED_ROOT / name) for name in TRAINED}
    with LLM(adapters=adapters, device="cpu", pool_bytes=1 << 29) as llm:
        outputs = llm.chat(
            [QUESTION] * len(names),
            SamplingParams(temperature=0.0, max_tokens=20),
            lora_request=[LoRARequest(name, 1) if name else None for name in names],
            use_tqdm=False,
        )
    texts = {name: output.outputs[0].text for name, output in zip(names, outputs, strict=True)}
    assert texts[""] == "The capital of France is Paris."
    assert len(set(texts.values())) == len(names)
    oracle = PeftOracle(Path(), TRAINED_ROOT, num_new_tokens=20, model=hf_model, names=TRAINED)
    for name, output in zip(names, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        expected = oracle.greedy(Case(name, tuple(output.prompt_token_ids)))
        assert answer == expected[: len(answer)], name
