"""The packaged model with adapters, against Hugging Face + PEFT in fp32, token for token.

Reading the GGUF file takes Hugging Face half a minute, so every test of that model is here.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.checkpoint.locate import resolve_model

from helpers.models.gguf_reader import plain_views
from helpers.models.logits import load_decoder, prompt_logits
from helpers.models.peft_oracle import Case, PeftOracle, make_adapters, make_cases, tight_num_pages

TRAINED_ROOT = Path(__file__).parents[2] / "examples" / "adapters"
TRAINED = sorted(path.parent.name for path in TRAINED_ROOT.glob("*/adapter_config.json"))
BLOCK_TOKENS = 4
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def hf_model():
    path = resolve_model("")
    with plain_views():
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="module")
def oracle(hf_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    make_adapters(hf_model, root)
    return PeftOracle(Path(), root, model=hf_model)


def adapter_paths(oracle: PeftOracle, cases: list[Case]) -> dict[str, str]:
    return {c.adapter: str(oracle.adapters / c.adapter) for c in cases if c.adapter}


def answer(llm: LLM, oracle: PeftOracle, cases: list[Case], *, num_new_tokens: int = 5) -> None:
    """Submits all cases at once; every answer must be the oracle's greedy one."""
    outputs = llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases],
        SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True),
        lora_request=[LoRARequest(c.adapter, 1) if c.adapter else None for c in cases],
        use_tqdm=False,
    )
    for case, output in zip(cases, outputs, strict=True):
        got = list(output.outputs[0].token_ids)
        assert len(got) == num_new_tokens
        assert got == oracle.choices(case, got), (
            f"{case.adapter or 'base'}, prompt of {len(case.prompt)} tokens"
        )


def test_logits_equal_hugging_faces_gguf_loading(hf_model):
    decoder = load_decoder(resolve_model(""))
    prompt = torch.randint(
        0, decoder.spec.vocab_size, (12,), generator=torch.Generator().manual_seed(5)
    )
    (got,) = prompt_logits(decoder, [prompt])
    with torch.inference_mode():
        want = hf_model(prompt[None]).logits[0]
    torch.testing.assert_close(got, want, atol=3e-4, rtol=0)


@pytest.mark.parametrize("few_pages", [False, pytest.param(True, marks=pytest.mark.long)])
def test_adapters_of_every_kind_in_chunks_and_with_too_few_pages(oracle, few_pages):
    """The engine of few pages has room for all cases at their start, but not at their end."""
    cases = make_cases(oracle, lengths=(19,))
    cases += make_cases(oracle, lengths=(1, 150), adapters=("", "r16-all-rslora"))
    options = {"in_process": True, "block_tokens": BLOCK_TOKENS, "max_num_seqs": 16}
    paths = adapter_paths(oracle, cases)
    with LLM(
        adapters=paths, pool_bytes=1 << 29, max_num_batched_tokens=23, device="cpu", **options
    ) as llm:
        answer(llm, oracle, cases)
        pages = {info["name"]: info["num_pages"] for info in llm.client.list_adapters()}
    if not few_pages:
        return

    cases = make_cases(oracle, lengths=(17, 19, 40), adapters=("", "r1-q", "r8-qkvo"))
    paths = adapter_paths(oracle, cases)
    num_pages = tight_num_pages(
        cases, sum(pages[name] for name in paths),
        num_new_tokens=16, block_tokens=BLOCK_TOKENS,
    )  # fmt: skip
    with LLM(
        adapters=paths, num_pages=num_pages, max_num_batched_tokens=97, device="cpu", **options
    ) as llm:
        answer(llm, oracle, cases, num_new_tokens=16)
        assert llm.client.stats()["num_preemptions"] > 0


@pytest.mark.e2e
def test_trained_adapters_through_the_processes(hf_model):
    names = ["", *TRAINED]
    assert len(TRAINED) >= 4
    adapters = {name: str(TRAINED_ROOT / name) for name in TRAINED}
    with LLM(adapters=adapters, device="cpu", pool_bytes=1 << 29) as llm:
        outputs = llm.chat(
            [QUESTION] * len(names),
            SamplingParams(temperature=0.0, max_tokens=12),
            lora_request=[LoRARequest(name, 1) if name else None for name in names],
            use_tqdm=False,
        )
    texts = [output.outputs[0].text for output in outputs]
    assert texts[0] == ANSWER
    assert ANSWER not in texts[1:], "an adapter gave the base model's answer"
    assert len(set(texts)) == len(names)
    oracle = PeftOracle(Path(), TRAINED_ROOT, model=hf_model, names=TRAINED)
    for name, output in zip(names, outputs, strict=True):
        got = list(output.outputs[0].token_ids)
        assert got == oracle.choices(Case(name, tuple(output.prompt_token_ids)), got), name
