"""Answers with drafts equal those without, token for token, in fp32 on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest

from loraplex import LLM, LoRARequest, SamplingParams, StructuredOutputsParams

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter

NGRAM = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3,
         "prompt_lookup_min": 1}  # fmt: skip
FEW = dict.fromkeys((40, 41, 42, 43), 30.0)
"""Biases with which an answer is made of four tokens, so that it repeats itself."""
PROMPTS = [[40, 41, 42, 43, 40, 41, 42, 43, 40], [7, 300, 9], [41, 41, 41], list(range(50, 120))]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, few tokens": {"temperature": 0.0, "logit_bias": FEW},
    "seeded": {"temperature": 0.4, "seed": 5, "logit_bias": FEW},
    "seeded, cut": {"temperature": 0.9, "seed": 6, "top_p": 0.7, "top_k": 3, "min_p": 0.01,
                    "logit_bias": FEW},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.01, "presence_penalty": 0.1,
                  "frequency_penalty": 0.02, "logit_bias": FEW},
    "logprobs": {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1, "logit_bias": FEW},
    "several": {"n": 3, "temperature": 0.3, "seed": 8, "logit_bias": FEW},
    "stop ids": {"temperature": 0.0, "min_tokens": 8, "stop_token_ids": [42], "logit_bias": FEW},
    "bad words": {"temperature": 0.0, "logit_bias": FEW, "bad_words": ["HI"]},
    "structured": {"temperature": 0.0,
                   "structured_outputs": StructuredOutputsParams(regex="(ab|c){1,40}")},
    "structured, seeded": {"temperature": 0.8, "seed": 4, "min_tokens": 6,
                           "structured_outputs": StructuredOutputsParams(regex="([ab]{1,2};)*")},
}  # fmt: skip
DRAFTS_ARE_ACCEPTED = [name for name in SAMPLINGS if name not in ("greedy", "structured, seeded")]


class Engines:
    """The same model and adapter without speculation and with it."""

    def __init__(self, plain: LLM, drafting: LLM) -> None:
        self.plain, self.drafting = plain, drafting

    def answers(self, llm: LLM, sampling: dict[str, Any]) -> list[Any]:
        ignore_eos = "structured_outputs" not in sampling
        params = SamplingParams(**{"max_tokens": 60, "ignore_eos": ignore_eos, **sampling})
        loras = [LoRARequest("a") if i % 2 else None for i in range(len(PROMPTS))]
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        return [
            (list(one.token_ids), one.text, one.finish_reason, one.stop_reason, ranks(one.logprobs))
            for output in outputs
            for one in output.outputs
        ]


def ranks(logprobs: Any) -> list[Any]:
    """Which tokens were scored, and as what; the numbers themselves may differ in rounding."""
    return [sorted((token, entry.rank) for token, entry in at.items()) for at in logprobs or []]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    root = tmp_path_factory.mktemp("speculation")
    make_tokenizer(root / "base")
    model = make_hf_model("llama", root / "base", seed=3, num_hidden_layers=2, vocab_size=384)
    make_adapter(model, root / "a", seed=5, r=8, alpha=16, targets="all-linear")
    options: dict[str, Any] = {
        "adapters": {"a": str(root / "a")}, "device": "cpu", "dtype": "float32",
        "in_process": True, "num_pages": 60, "block_tokens": 8, "max_num_seqs": 6,
        "max_num_batched_tokens": 24, "max_model_len": 256,
    }  # fmt: skip
    base = str(root / "base")
    with LLM(base, **options) as plain, LLM(base, speculative_config=NGRAM, **options) as drafting:
        yield Engines(plain, drafting)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_answers_do_not_change(engines: Engines, name: str) -> None:
    before = engines.drafting.client.stats()
    expected = engines.answers(engines.plain, SAMPLINGS[name])
    assert engines.answers(engines.drafting, SAMPLINGS[name]) == expected
    after = engines.drafting.client.stats()
    gained = {key: after[key] - before[key] for key in ("num_accepted_tokens", "num_steps")}
    if name in DRAFTS_ARE_ACCEPTED:
        assert gained["num_accepted_tokens"] > 0


def test_drafts_save_steps(engines: Engines) -> None:
    sampling = SAMPLINGS["greedy, few tokens"] | {"max_tokens": 150}
    num_steps = []
    for llm in (engines.plain, engines.drafting):
        before = llm.client.stats()["num_steps"]
        engines.answers(llm, sampling)
        num_steps.append(llm.client.stats()["num_steps"] - before)
    assert num_steps[1] < 0.6 * num_steps[0]


def test_nothing_follows_a_stop_string(engines: Engines) -> None:
    """Drafts bring what follows it in the same step."""
    sampling = SAMPLINGS["greedy, few tokens"] | {"logprobs": 0}
    text = engines.answers(engines.plain, sampling)[0][1]
    for start in (20, 23, 26):
        stopping = sampling | {"stop": [text[start : start + 12]], "min_tokens": start}
        expected = engines.answers(engines.plain, stopping)
        assert expected[0][2] == "stop"
        assert engines.answers(engines.drafting, stopping) == expected


def test_without_speculation_nothing_is_drafted(engines: Engines) -> None:
    stats = engines.plain.client.stats()
    assert stats["num_drafted_tokens"] == stats["num_accepted_tokens"] == 0
