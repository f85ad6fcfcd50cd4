"""Several worker ranks over gloo and real processes, in fp32, against Hugging Face + PEFT.

All tests of a setup share one engine. Its pool is small, so that requests are preempted, and its
steps are short, so that prompts run in chunks. Sizes are odd, so that no rank count divides them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.errors import UnknownAdapterError
from loraplex.entrypoints.client.outputs import PositionLogprobs, RequestOutput

from helpers.models.engine_runs import answer, check, greedy
from helpers.models.gguf_files import write_gguf
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import ADAPTERS, Case, PeftOracle, make_adapters, make_cases

MAX_STEP_TOKENS = 40
NUM_PAGES, BLOCK_TOKENS = 160, 8
NAMES = (*ADAPTERS, "r3-od")  # ranks 1 to 64, subsets of modules, rsLoRA, patterns
ODD = {"intermediate_size": 161, "vocab_size": 509}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Setup:
    architecture: str
    world_size: int
    overrides: dict[str, Any] = field(default_factory=dict)
    is_gguf: bool = False


SETUPS = {
    "llama-biases-gguf-4": Setup("llama", 4, {**ODD, **BIASES}, is_gguf=True),  # 2 KV heads
    "qwen2-tied-2": Setup("qwen2", 2, {**ODD, **TIED}),
    "qwen3-2": Setup("qwen3", 2, ODD),  # norms of query and key heads
}
MORE_SETUPS = {
    "llama-2": Setup("llama", 2),
    "llama-biases-4": Setup("llama", 4, {**ODD, **BIASES}),
    "llama-one-kv-head-4": Setup("llama", 4, {**ODD, "num_key_value_heads": 1}),
    "llama-mha-tied-4": Setup("llama", 4, {**TIED, "num_key_value_heads": 4}),
    "llama3-2": Setup("llama3", 2),  # scaled RoPE
    "llama-biases-tied-gguf-2": Setup("llama", 2, {**ODD, **BIASES, **TIED}, is_gguf=True),
    "mistral-2": Setup("mistral", 2, ODD),
    "qwen2-tied-4": Setup("qwen2", 4, {**ODD, **TIED}),
    "qwen2-gguf-2": Setup("qwen2", 2, is_gguf=True),
    "qwen3-tied-4": Setup("qwen3", 4, TIED),
}


@dataclass(frozen=True)
class Ranks:
    """An engine of several ranks, and the oracle of its model and adapters."""

    llm: LLM
    oracle: PeftOracle

    def cases(self, *lengths: int, adapters: tuple[str, ...] = ("", *NAMES)) -> list[Case]:
        return make_cases(self.oracle, lengths, adapters)


@pytest.fixture(
    scope="module",
    params=[*SETUPS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_SETUPS)],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    setup = {**SETUPS, **MORE_SETUPS}[request.param]
    root = tmp_path_factory.mktemp("ranks")
    model = make_hf_model(setup.architecture, root / "base", seed=3, **setup.overrides)
    adapters = root / "adapters"
    make_adapters(model, adapters)
    make_adapter(model, adapters / "r3-od", r=3, alpha=6, targets=["o_proj", "down_proj"], seed=9)
    base = root / "base"
    if setup.is_gguf:
        base = root / "base.gguf"
        write_gguf(base, model)
    with LLM(
        str(base),
        adapters={name: str(adapters / name) for name in NAMES},
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        tensor_parallel_size=setup.world_size,
        block_tokens=BLOCK_TOKENS,
        num_pages=NUM_PAGES,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        max_num_seqs=8,
    ) as llm:
        yield Ranks(llm, PeftOracle(root / "base", adapters, model=model, names=list(NAMES)))


def test_each_rank_says_what_it_holds(ranks: Ranks) -> None:
    """Ranks hold equal parts. A rank's part of a small model is a little more than its share: the
    norms are whole, sizes are padded, and KV heads may be copied."""
    client = ranks.llm.client
    workers = client.health()["workers"]
    whole = sum(t.nbytes for t in load_file(ranks.oracle.base / "model.safetensors").values())
    typical = client.load_adapter("typical", str(ranks.oracle.adapters / "r16-all-rslora"))
    client.unload_adapter("typical")
    page_bytes = workers[0]["pool_bytes"] // NUM_PAGES
    for rank, worker in enumerate(workers):
        assert (worker["rank"], worker["adapter_rank"]) == (rank, 16)
        share = worker["weight_bytes"] * len(workers) / whole
        assert 1 <= share < 1.25
        assert worker["pool_bytes"] == NUM_PAGES * page_bytes
        assert worker["adapter_bytes"] == typical["num_pages"] * page_bytes


def test_one_batch_of_base_rows_and_all_adapters(ranks: Ranks) -> None:
    cases = ranks.cases(1, 17, 64)
    before = ranks.llm.client.stats()
    check(ranks.oracle, cases, answer(ranks.llm, cases))
    stats = ranks.llm.client.stats()
    num_steps = stats["num_steps"] - before["num_steps"]
    assert num_steps > sum(len(case.prompt) for case in cases) // MAX_STEP_TOKENS  # in chunks


def test_a_warm_prefix_cache(ranks: Ranks) -> None:
    cases = ranks.cases(50, adapters=("", "r1-q", "r3-od", "r8-qkvo"))
    for is_warm in (False, True):
        outputs = answer(ranks.llm, cases)
        check(ranks.oracle, cases, outputs)
        assert [output.num_cached_tokens for output in outputs] == [48 * is_warm] * len(cases)


def test_preemption(ranks: Ranks) -> None:
    """All eight requests start and outgrow the pool."""
    cases = ranks.cases(88, 89, 90, 92, adapters=("", "r3-od"))
    num_tokens = NUM_PAGES * BLOCK_TOKENS // len(cases) - 80
    before = ranks.llm.client.stats()["num_preemptions"]
    outputs = answer(ranks.llm, cases, max_tokens=num_tokens)
    check(ranks.oracle, cases, outputs, num_tokens)
    assert ranks.llm.client.stats()["num_preemptions"] > before


def test_logprobs_of_answer_and_prompt(ranks: Ranks) -> None:
    cases = ranks.cases(3, 45, adapters=("", "r16-all-rslora", "r64-kd"))
    outputs = answer(ranks.llm, cases, max_tokens=4, logprobs=3, prompt_logprobs=2)
    check(ranks.oracle, cases, outputs, 4)
    for case, output in zip(cases, outputs, strict=True):
        first, *of_prompt = output.prompt_logprobs
        assert first is None
        expected = expected_logprobs(ranks, case, output)
        of_answer = expected[len(of_prompt) :]
        assert_close(of_prompt, expected, list(case.prompt[1:]), num_best=2)
        assert_close(output.outputs[0].logprobs, of_answer, output.outputs[0].token_ids, num_best=3)


def test_all_ranks_draw_the_same_tokens(ranks: Ranks) -> None:
    """A rank that drew another token would feed another history than the answer shows."""
    cases = ranks.cases(20, adapters=("", "r1-q", "r3-od", "r8-qkvo"))
    params = [
        SamplingParams(
            temperature=1.5, seed=seed, max_tokens=12, ignore_eos=True, detokenize=False,
            logprobs=0, **options,
        )
        for seed, options in enumerate(
            [{}, {"top_p": 0.8}, {"min_p": 0.1, "top_k": 20}, {"repetition_penalty": 1.3}]
        )
    ]  # fmt: skip
    lora = [LoRARequest(case.adapter) if case.adapter else None for case in cases]
    prompts = [{"prompt_token_ids": case.prompt} for case in cases]
    outputs = ranks.llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        (got,) = output.outputs
        expected = expected_logprobs(ranks, case, output)[len(case.prompt) - 1 :]
        assert_close(got.logprobs, expected, got.token_ids, num_best=0)


def expected_logprobs(ranks: Ranks, case: Case, output: RequestOutput) -> torch.Tensor:
    """Returns the oracle's logprobs after each token of prompt and answer but the last."""
    tokens = [*case.prompt, *output.outputs[0].token_ids]
    return ranks.oracle.logits(case, tokens[:-1]).log_softmax(-1)


def assert_close(
    got: Sequence[PositionLogprobs | None],
    expected: torch.Tensor,
    token_ids: Sequence[int],
    *,
    num_best: int,
) -> None:
    """Each position holds its token and the best ones, with their logprobs and ranks."""
    assert len(got) == len(token_ids)
    for token, entries, row in zip(token_ids, got, expected, strict=False):
        assert entries is not None
        assert set(entries) == {token, *row.topk(num_best).indices.tolist()}
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-3)
            assert entry.rank == 1 + int((row > row[token_id]).sum())


def test_an_adapter_replaced_and_unloaded_under_load(ranks: Ranks) -> None:
    """A request keeps the adapter that its name meant when the request came."""
    client, folder = ranks.llm.client, ranks.oracle.adapters
    client.load_adapter("swapped", str(folder / "r8-qkvo"))
    expected: dict[str, Case] = {}
    results: dict[str, RequestOutput] = {}

    def submit(adapter: str) -> None:
        for case in ranks.cases(5, 30, adapters=(adapter, "")):
            name = "swapped" if case.adapter else None
            request_id = client.submit(list(case.prompt), greedy(max_tokens=24), adapter=name)
            expected[request_id] = case

    submit("r8-qkvo")
    stream = client.generate([7, 8, 9], greedy(max_tokens=24), adapter="swapped")
    next(stream)  # the first version is in pages, and its requests run
    client.load_adapter("swapped", str(folder / "r64-kd"))
    submit("r64-kd")
    client.unload_adapter("swapped")
    with pytest.raises(UnknownAdapterError, match="swapped"):
        next(client.generate([1], adapter="swapped"))
    (*_, last) = stream
    while client.num_outstanding:
        results |= {result.request_id: result for result in client.poll()}
    check(ranks.oracle, list(expected.values()), [results[i] for i in expected], 24)
    check(ranks.oracle, [Case("r8-qkvo", (7, 8, 9))], [last], 24)
    assert "swapped" not in [adapter["name"] for adapter in client.list_adapters()]
