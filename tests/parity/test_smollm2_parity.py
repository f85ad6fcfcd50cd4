"""The packaged model with adapters, against Hugging Face + PEFT in fp32, token for token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.models.packaged import resolve_model

from helpers.peft_oracle import Case, PeftOracle, adapter_names, make_adapters

TRAINED = sorted(
    path.parent.name
    for path in (Path(__file__).parents[2] / "examples" / "adapters").glob("*/adapter_config.json")
)
TRAINED_ROOT = Path(__file__).parents[2] / "examples" / "adapters"
NUM_NEW_TOKENS = 8
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


def test_random_adapters_of_every_kind(oracle):
    generator = torch.Generator().manual_seed(2)
    cases = []
    for length in (1, 19, 600):
        prompt = tuple(torch.randint(0, 49152, (length,), generator=generator).tolist())
        names = ("", *adapter_names()) if length < 600 else ("", "r16-all-rslora")
        cases += [Case(name, prompt) for name in names]
    adapters = {name: str(oracle.adapters / name) for name in adapter_names()}
    with LLM(adapters=adapters, device="cpu", in_process=True, pool_bytes=1 << 29) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": case.prompt} for case in cases],
            SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True),
            lora_request=[LoRARequest(c.adapter, 1) if c.adapter else None for c in cases],
            use_tqdm=False,
        )
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == oracle.greedy(case), (
            f"{case.adapter or 'base'}, prompt of {len(case.prompt)} tokens"
        )


@pytest.mark.e2e
def test_trained_adapters_through_the_processes(hf_model):
    names = ["", *TRAINED]
    adapters = {name: str(TRAINED_ROOT / name) for name in TRAINED}
    with LLM(adapters=adapters, device="cpu", pool_bytes=1 << 29) as llm:
        outputs = llm.chat(
            [QUESTION] * len(names),
            SamplingParams(temperature=0.0, max_tokens=24),
            lora_request=[LoRARequest(name, 1) if name else None for name in names],
            use_tqdm=False,
        )
    texts = {name: output.outputs[0].text for name, output in zip(names, outputs, strict=True)}
    assert texts[""] == "The capital of France is Paris."
    assert len(set(texts.values())) == len(names)
    oracle = PeftOracle(Path(), TRAINED_ROOT, num_new_tokens=24, model=hf_model, names=TRAINED)
    for name, output in zip(names, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        expected = oracle.greedy(Case(name, tuple(output.prompt_token_ids)))
        assert answer == expected[: len(answer)], name
