"""All kinds of requests at once, through the real processes with too few pages, get what each gets
alone: sampling, seeds, penalties, stops, logprobs, several answers, adapters, tenants, cancels."""

import random
from pathlib import Path
from typing import Any

import pytest

from loraplex import LLM, Client, LoRARequest, RequestOutput, SamplingParams
from loraplex.entrypoints.client.outputs import CompletionOutput

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter

pytestmark = pytest.mark.e2e

ADAPTERS = {"a": {"r": 4, "targets": ["q_proj", "v_proj"]}, "b": {"r": 8, "targets": "all-linear"}}
WORDS = ["the sea", "pages", " adapters", "ü", "日本", "\n", "rank 16", "kernel", "🙂", "once upon"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    make_tokenizer(root / "base")
    model = make_hf_model("llama", root / "base", seed=5)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / name, alpha=8, seed=seed, **options)
    return root


def draw_request(rng: random.Random) -> dict[str, Any]:
    """Returns a prompt, sampling parameters, an adapter and a tenant."""
    params: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "seed": rng.randrange(1 << 40)}
    params["temperature"] = rng.choice([0.0, 0.0, 0.7, 1.3])
    options: dict[str, Any] = {
        "top_k": rng.choice([5, 40]),
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
        "logprobs": rng.choice([0, 3]),
        "prompt_logprobs": 1,
        "n": rng.choice([2, 3]),
        "min_tokens": 1,
        "stop": [rng.choice("etaoinsh"), "zz"],
        "include_stop_str_in_output": True,
        "stop_token_ids": [rng.randrange(256) for _ in range(8)],
        "ignore_eos": True,
        "logit_bias": {rng.randrange(256): 4.0, rng.randrange(256): -50.0},
    }
    for name in rng.sample(sorted(options), k=rng.randint(0, 6)):
        params[name] = options[name]
    return {
        "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 60))),
        "params": SamplingParams(**params),
        "adapter": rng.choice(["", *ADAPTERS]),
        "salt": rng.choice(["", "tenant"]),
        "cancel": rng.random() < 0.15,
    }


def run_alone(llm: LLM, request: dict[str, Any]) -> RequestOutput:
    lora = LoRARequest(request["adapter"]) if request["adapter"] else None
    (output,) = llm.generate(
        request["prompt"], request["params"], lora_request=lora, use_tqdm=False
    )
    return output


def run_together(client: Client, requests: list[dict[str, Any]]) -> dict[int, RequestOutput]:
    """Submits everything at once; cancels those to be cancelled when their first token comes."""
    ids = {}
    for index, request in enumerate(requests):
        request_id = client.submit(
            request["prompt"], request["params"], adapter=request["adapter"] or None,
            salt=request["salt"], stream=True,
        )  # fmt: skip
        ids[request_id] = index
    finished: dict[int, RequestOutput] = {}
    while client.num_outstanding:
        for output in client.poll(timeout_s=60):
            assert isinstance(output, RequestOutput), output
            index = ids[output.request_id]
            if requests[index]["cancel"] and not output.finished:
                client.cancel(output.request_id)
            if output.finished:
                assert index not in finished, "a request ended twice"
                finished[index] = output
    return finished


def check_same(got: CompletionOutput, want: CompletionOutput, where: object) -> None:
    assert list(got.token_ids) == list(want.token_ids), where
    assert got.text == want.text, where
    assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason), where
    if want.logprobs is None:
        assert got.logprobs is None, where
        return
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        assert ours.keys() == theirs.keys(), where
        for token in ours:
            assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-3), where
            assert ours[token].rank == theirs[token].rank, where


@pytest.mark.parametrize("num_requests", [20, pytest.param(300, marks=pytest.mark.long)])
def test_mixed_traffic_is_what_each_request_gets_alone(root: Path, num_requests: int) -> None:
    rng = random.Random(20)
    requests = [draw_request(rng) for _ in range(num_requests)]
    adapters = {name: str(root / name) for name in ADAPTERS}
    options: dict[str, Any] = {"adapters": adapters, "device": "cpu", "block_tokens": 4}
    with LLM(str(root / "base"), num_pages=4000, in_process=True, **options) as llm:
        alone = [run_alone(llm, request) for request in requests]
    with LLM(
        str(root / "base"), num_pages=250, max_num_seqs=24, max_num_batched_tokens=64, **options
    ) as llm:
        finished = run_together(llm.client, requests)
        stats = llm.client.stats()
    for index, request in enumerate(requests):
        where = (index, request)
        if index not in finished:
            assert request["cancel"], where
            continue
        for got, want in zip(finished[index].outputs, alone[index].outputs, strict=True):
            if got.finish_reason != "abort":
                check_same(got, want, where)
    assert len(finished) >= num_requests - sum(request["cancel"] for request in requests)
    assert stats["num_preemptions"] > 0
    assert stats["running"] == stats["waiting"] == stats["pages_kv"] == 0
