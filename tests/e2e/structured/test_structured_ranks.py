"""Two worker ranks give constrained and free rows of one batch the answers of one rank."""

import random
from pathlib import Path

import pytest

from loraplex import LLM, LoRARequest, RequestOutput, SamplingParams

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter
from helpers.running.random_forms import Form, random_form

pytestmark = pytest.mark.e2e
NUM_ROWS = 24
ADAPTERS = (None, LoRARequest("a"), LoRARequest("b"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    make_tokenizer(root / "base")
    model = make_hf_model("llama", root / "base", seed=5)  # 512 logits, 384 tokens
    make_adapter(model, root / "a", r=4, alpha=8, targets="all-linear", seed=1)
    make_adapter(model, root / "b", r=3, alpha=8, targets=["q_proj", "o_proj"], seed=2)
    return root


def answers(models: Path, forms: list[Form | None], num_ranks: int) -> list[RequestOutput]:
    params = [
        SamplingParams(
            temperature=(0.0, 1.0)[seed % 4 < 2],
            max_tokens=30 if form is None else 200,
            seed=seed,
            structured_outputs=form.params if form else None,
        )
        for seed, form in enumerate(forms)
    ]
    with LLM(
        str(models / "base"),
        adapters={name: str(models / name) for name in "ab"},
        device="cpu",
        dtype="float32",
        tensor_parallel_size=num_ranks,
        num_pages=400,
        max_model_len=512,
    ) as llm:
        adapters = [ADAPTERS[row % 3] for row in range(NUM_ROWS)]
        prompts = [f"row {row}" for row in range(NUM_ROWS)]
        return llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)


def test_two_ranks_answer_as_one(models: Path) -> None:
    rng = random.Random(7)
    forms = [random_form(rng) if row % 2 else None for row in range(NUM_ROWS)]
    one, two = (answers(models, forms, num_ranks) for num_ranks in (1, 2))
    for form, a, b in zip(forms, one, two, strict=True):
        assert list(a.outputs[0].token_ids) == list(b.outputs[0].token_ids)
        assert a.outputs[0].finish_reason == b.outputs[0].finish_reason
        if form and a.outputs[0].finish_reason == "stop":
            assert not form.fault(a.outputs[0].text)
    ended = [a.outputs[0].finish_reason for form, a in zip(forms, one, strict=True) if form]
    assert ended.count("stop") >= len(ended) - 2
