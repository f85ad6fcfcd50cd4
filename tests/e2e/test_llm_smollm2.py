"""LLM over the real processes and the packaged SmolLM2-135M-Instruct.

tests/parity/test_smollm2_parity.py holds its adapters to Hugging Face.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import LLM, LoRARequest, RequestOutput, SamplingParams
from loraplex.engine.errors import ClientError

pytestmark = pytest.mark.e2e

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
ADAPTER = "pirate"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(adapter_dir=str(ADAPTERS), num_pages=600, max_model_len=2048) as made:
        yield made


def text_of(output: RequestOutput) -> str:
    return output.outputs[0].text


def test_chat(llm: LLM) -> None:
    (output,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    assert text_of(output) == ANSWER
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    assert output.finished


def test_text_and_token_prompts_agree(llm: LLM) -> None:
    text, params = "The capital of France is", SamplingParams(temperature=0.0, max_tokens=6)
    token_ids = llm.get_tokenizer().encode(text)
    outputs = llm.generate(
        [text, {"prompt": text}, {"prompt_token_ids": token_ids}], params, use_tqdm=False
    )
    assert len({text_of(output) for output in outputs}) == 1
    assert "Paris" in text_of(outputs[0])
    assert [output.prompt_token_ids for output in outputs] == [token_ids] * 3
    assert outputs[0].prompt == text


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("The capital of France is", params, use_tqdm=False)
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids)
    total = 0.0
    for token_id, entries in zip(answer.token_ids, answer.logprobs, strict=True):
        assert 2 <= len(entries) <= 3
        assert entries[token_id].rank == 1
        total += entries[token_id].logprob
        assert entries[token_id].decoded_token is not None
    assert answer.cumulative_logprob is not None
    assert math.isclose(answer.cumulative_logprob, total, abs_tol=1e-4)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids or ())


def test_stop_strings(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=[" France"])
    (output,) = llm.chat(QUESTION, params, use_tqdm=False)
    assert text_of(output) == "The capital of"
    assert output.outputs[0].stop_reason == " France"


def test_seeded_answers_do_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=8)
    (alone,) = llm.generate("Once upon a time", params, use_tqdm=False)
    crowd = llm.generate(["Hello", "Once upon a time", "In the beginning"], params, use_tqdm=False)
    assert text_of(crowd[1]) == text_of(alone)


def test_n_answers_differ(llm: LLM) -> None:
    (output,) = llm.generate(
        "Once upon a time", SamplingParams(n=3, seed=1, max_tokens=8), use_tqdm=False
    )
    assert len({answer.text for answer in output.outputs}) == 3


def test_prefix_cache_is_used_and_kept_apart(llm: LLM) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    params = SamplingParams(temperature=0.0, max_tokens=2)
    llm.generate(prompt, params, use_tqdm=False)
    again, salted, adapted = llm.generate(
        [prompt, {"prompt": prompt, "cache_salt": "x"}, prompt],
        params,
        lora_request=[None, None, LoRARequest(ADAPTER)],
        use_tqdm=False,
    )
    assert (again.num_cached_tokens or 0) >= 48
    assert salted.num_cached_tokens == adapted.num_cached_tokens == 0


def test_too_long_a_prompt_names_itself(llm: LLM) -> None:
    with pytest.raises(ClientError, match=r"prompt 1: .*max_model_len is 2048"):
        llm.generate(["x", "a b " * 2000], GREEDY, use_tqdm=False)
    assert text_of(llm.chat(QUESTION, GREEDY, use_tqdm=False)[0]) == ANSWER
