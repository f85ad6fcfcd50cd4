"""Adapters whose weights overflow, in a real engine: their requests fail, the others' do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.errors import ClientError
from loraplex.entrypoints.client.outputs import RequestFailure

from helpers.models.engine_runs import NUM_NEW_TOKENS, check
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import Case, PeftOracle

PROMPT = tuple(range(3, 43))
KINDS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 5, "top_p": 0.9},
    "penalized": {"temperature": 0.0, "repetition_penalty": 1.2, "min_tokens": 4},
    "biased": {"temperature": 0.0, "logit_bias": {7: 3.0}},
    "logprobs": {"temperature": 0.7, "logprobs": 3},
    "prompt-logprobs": {"temperature": 0.0, "prompt_logprobs": 1},
    "several": {"temperature": 0.9, "n": 3},
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    root = tmp_path_factory.mktemp("not-finite")
    model = make_hf_model("llama", root / "base", seed=3)
    make_adapter(model, root / "good", r=4, alpha=8, targets="all-linear", seed=1)
    make_adapter(model, root / "wild", r=4, alpha=8, targets="all-linear", seed=2, strength=1e30)
    return PeftOracle(root / "base", root, model=model, names=["good"])


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def llm(request: pytest.FixtureRequest, oracle: PeftOracle) -> LLM:
    adapters = {name: str(oracle.adapters / name) for name in ("good", "wild")}
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 24, "num_pages": 200}
    with LLM(
        str(oracle.base), adapters=adapters, device=request.param, dtype="float32",
        in_process=True, skip_tokenizer_init=True, **options,
    ) as llm:  # fmt: skip
        yield llm


def params(**values: object) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False, **values)


@pytest.mark.parametrize("kind", KINDS)
def test_request_fails_beside_others_that_do_not(llm: LLM, oracle: PeftOracle, kind: str) -> None:
    client = llm.client
    cases = {
        client.submit([*case.prompt], params(temperature=0.0), adapter=case.adapter or None): case
        for case in (Case("", PROMPT), Case("good", PROMPT), Case("good", PROMPT[:9]))
    }
    lost = [client.submit([*PROMPT], params(**KINDS[kind]), adapter="wild") for _ in range(2)]
    results = {}
    while client.num_outstanding:
        results.update((r.request_id, r) for r in client.poll(60.0) if r.request_id not in results)
    check(oracle, list(cases.values()), [results[request_id] for request_id in cases])
    for request_id in lost:
        failure = results[request_id]
        assert isinstance(failure, RequestFailure)
        assert isinstance(failure.error, ClientError)
        assert failure.error.code == "not_finite"
        assert "adapter 'wild'" in str(failure.error)
    stats = client.stats()
    assert stats["running"] == stats["waiting"] == stats["pages_kv"] == 0


def test_no_block_of_it_is_cached(llm: LLM) -> None:
    # A prompt of its own: a request that is cancelled before its result comes may leave blocks.
    prompt = [*reversed(PROMPT)]
    before = llm.client.stats()["prefix_hit_tokens"]
    for _ in range(2):
        with pytest.raises(ClientError, match="position"):
            llm.generate(
                {"prompt_token_ids": prompt}, params(), lora_request=LoRARequest("wild", 2)
            )
    assert llm.client.stats()["prefix_hit_tokens"] == before


def test_bias_of_minus_infinity_is_a_mask(llm: LLM) -> None:
    first, second = (
        llm.generate({"prompt_token_ids": [*PROMPT]}, params(temperature=0.0, logit_bias=bias))
        for bias in ({}, {3: -torch.inf})
    )
    banned = first[0].outputs[0].token_ids[0]
    masked = llm.generate(
        {"prompt_token_ids": [*PROMPT]},
        params(temperature=0.0, logit_bias={banned: -torch.inf}),
    )
    assert second[0].outputs[0].token_ids
    assert banned not in masked[0].outputs[0].token_ids


def test_value_that_one_rank_alone_computes_ends_the_request_on_all(tmp_path: Path) -> None:
    """The last row of the head belongs to the last rank. The ranks must agree, or they would
    diverge or wait for each other."""
    make_hf_model("llama3", tmp_path, seed=3, tie_word_embeddings=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][-1, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with LLM(
        str(tmp_path), device="cpu", dtype="float32", skip_tokenizer_init=True,
        tensor_parallel_size=2, num_pages=100, max_num_seqs=8,
    ) as llm:  # fmt: skip
        for kind in ("greedy", "sampled", "logprobs"):
            requests = [[*PROMPT], [*PROMPT[:5]]]
            for prompt in requests:
                llm.client.submit(prompt, params(**KINDS[kind]))
            results = []
            while llm.client.num_outstanding:
                results += llm.client.poll(60.0)
            codes = [r.error.code for r in results if isinstance(r, RequestFailure)]
            assert codes == ["not_finite"] * len(requests)
        stats = llm.client.stats()
        assert stats["running"] == stats["pages_kv"] == stats["pages_prefix"] == 0
