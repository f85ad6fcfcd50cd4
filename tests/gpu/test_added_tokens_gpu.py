"""Requests of an adapter with added tokens on a GPU, beside base rows and steps with graphs."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

import pytest

from loraplex import LLM, LoRARequest, SamplingParams

from helpers.models.hf_models import make_hf_model
from helpers.vocabularies.resized_models import make_resized_adapter

LAST = 512 + 70
PROMPT = {"prompt_token_ids": [5, LAST, 7, 512, 9]}
BASE_PROMPT = {"prompt_token_ids": [5, 6, 7]}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.long)
    ],
)  # fmt: skip
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("added")
    sizes = {"hidden_size": 256, "head_dim": 64}
    make_hf_model("llama", root / "base", seed=3, **sizes)
    make_resized_adapter(
        root / "base",
        root / "added",
        LAST + 1,
        r=8,
        alpha=16,
        targets=["q_proj", "embed_tokens", "lm_head"],
    )
    with LLM(
        str(root / "base"), device=request.param, dtype="bfloat16", skip_tokenizer_init=True,
        in_process=True, num_pages=512, adapters={"added": str(root / "added")},
    ) as llm:  # fmt: skip
        yield llm


def answers(llm: LLM, params: list[SamplingParams], names: list[str]) -> list[Any]:
    prompts = [PROMPT if name else BASE_PROMPT for name in names]
    requests = [LoRARequest(name) if name else None for name in names]
    return llm.generate(prompts, params, lora_request=requests, use_tqdm=False)


def sampling(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "detokenize": False, **values})


def test_each_row_draws_its_own_tokens(llm: LLM) -> None:
    masked = sampling(allowed_token_ids=[LAST, 512, 3], seed=1)
    free = sampling(logit_bias={LAST: 30.0}, top_k=5, top_p=0.9, seed=2)
    penalized = sampling(repetition_penalty=1.3, presence_penalty=0.5, seed=3)
    base = sampling(allowed_token_ids=[3, 511], seed=4)
    plain = sampling(temperature=0.0)
    names = ["added", "added", "added", "", ""]
    outputs = answers(llm, [masked, free, penalized, base, plain], names)
    drawn = [set(output.outputs[0].token_ids) for output in outputs]
    assert drawn[0] <= {LAST, 512, 3} and drawn[0] & {LAST, 512}
    assert drawn[1] == {LAST}
    assert max(drawn[2]) <= LAST
    assert drawn[3] <= {3, 511}
    (alone,) = answers(llm, [plain], [""])  # by CUDA graphs, where there are any
    assert max(alone.outputs[0].token_ids) < 512 > max(drawn[4])


def test_log_probabilities(llm: LLM) -> None:
    (output,) = answers(llm, [sampling(temperature=0.0, prompt_logprobs=1, logprobs=3)], ["added"])
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert all(isfinite(entry.logprob) for ranked in entries for entry in ranked.values())
    assert LAST in output.prompt_logprobs[1] and 512 in output.prompt_logprobs[3]
