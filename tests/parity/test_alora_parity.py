"""Activated LoRA against PEFT, in fp32 on the CPU, token for token, and the blocks that it shares.

`tokens` is an adapter's invocation; a prompt holds it nowhere, somewhere or twice.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets

from loraplex import LLM, LoRAMix, LoRARequest

from helpers.models.engine_runs import answer, check, greedy
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import Case, PeftOracle

INVOCATIONS = {"judge": [7, 11, 7], "rewrite": [13], "biased": [13]}
NAMES = (*INVOCATIONS, "plain")
BLOCK = 16


class ALoRAOracle(PeftOracle):
    """Finds the invocation in the prompt alone, as PEFT's generate() does."""

    def logits(self, case: Case, tokens: list[int]) -> torch.Tensor:
        if case.adapter not in INVOCATIONS:
            return super().logits(case, tokens)
        prompt = torch.tensor([case.prompt])
        (offset,) = calculate_alora_offsets(self.model.peft_config, case.adapter, prompt)
        if offset is not None:
            offset += len(tokens) - len(case.prompt)
        with torch.inference_mode():
            self.model.set_adapter(case.adapter)
            logits: torch.Tensor = self.model(torch.tensor([tokens]), alora_offsets=[offset]).logits
        return logits[0].float()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    root = tmp_path_factory.mktemp("alora")
    model = make_hf_model("llama3", root / "base", seed=3)
    for seed, (name, tokens) in enumerate(INVOCATIONS.items()):
        make_adapter(
            model, root / "adapters" / name, r=8 + seed, alpha=16, targets="all-linear", seed=seed,
            alora_invocation_tokens=tokens, lora_bias=name == "biased",
        )  # fmt: skip
    make_adapter(model, root / "adapters" / "plain", r=4, alpha=8, targets=["q_proj"], seed=5)
    return ALoRAOracle(root / "base", root / "adapters", model=model, names=list(NAMES))


def make_llm(oracle: PeftOracle, **options: Any) -> LLM:
    values = {
        "device": "cpu", "dtype": "float32", "in_process": True, "skip_tokenizer_init": True,
        "max_num_seqs": 16, "max_num_batched_tokens": 2048, "num_pages": 1024,
        "block_tokens": BLOCK,
    }  # fmt: skip
    adapters = {name: str(oracle.adapters / name) for name in NAMES}
    return LLM(str(oracle.base), adapters=adapters, **(values | options))


def text(length: int, seed: int = 0) -> list[int]:
    """Returns tokens without an invocation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, 500, (length,), generator=generator).tolist()


def make_alora_cases() -> list[Case]:
    judge, rewrite = INVOCATIONS["judge"], INVOCATIONS["rewrite"]
    prompts = [
        text(40),  # absent
        [*text(33), *judge],
        [*text(16), *judge, *text(20, 1)],  # it begins a block
        [*judge, *text(25)],
        [*text(10), *judge, *text(21, 1), *judge, *text(3, 2)],  # the last one counts
        [*text(30), *judge, *rewrite, *text(9, 1)],
        [*text(5), 7, 11, 7, 11, 7, *text(4, 1)],  # they overlap
        [*rewrite],
    ]
    return [Case(name, tuple(p)) for p in prompts for name in ("", *NAMES)]


def test_one_batch_of_everything(oracle: PeftOracle) -> None:
    cases = make_alora_cases()
    with make_llm(oracle) as llm:
        check(oracle, cases, answer(llm, cases))
        warm = answer(llm, cases)
        check(oracle, cases, warm)
        (row,) = llm.client.list_adapters("judge")
        assert row["invocation_tokens"] == INVOCATIONS["judge"]
    answers = {(c.adapter, c.prompt): o.outputs[0].token_ids
               for c, o in zip(cases, warm, strict=True)}  # fmt: skip
    differs = [answers["judge", p] != answers["", p] for a, p in answers if a == "judge"]
    assert any(differs) and not differs[0]


@pytest.mark.parametrize("case", ["chunks", "pages"])
def test_scheduling(oracle: PeftOracle, case: str) -> None:
    options: dict[str, Any] = {
        "chunks": {"max_num_seqs": 8, "max_num_batched_tokens": 11},
        "pages": {"block_tokens": 4, "num_pages": 180, "enable_prefix_caching": False},
    }[case]
    cases = make_alora_cases()
    with make_llm(oracle, **options) as llm:
        for _ in range(3 if case == "pages" else 1):
            check(oracle, cases, answer(llm, cases))
        assert case != "pages" or llm.client.stats()["num_preemptions"] > 0


@pytest.fixture
def llm(oracle: PeftOracle) -> Iterator[LLM]:
    with make_llm(oracle) as llm:
        yield llm


def test_blocks_before_the_invocation_are_shared_in_both_directions(
    oracle: PeftOracle, llm: LLM
) -> None:
    """`num_cached` of a request counts what all requests before it left."""

    def ask(adapter: str, prompt: list[int], num_cached: int) -> None:
        case = Case(adapter, tuple(prompt))
        (output,) = answer(llm, [case])
        check(oracle, [case], [output])
        assert output.num_cached_tokens == num_cached, (adapter, len(prompt))

    judge, rewrite = INVOCATIONS["judge"], INVOCATIONS["rewrite"]
    talk = text(100)
    ask("", talk, 0)
    ask("judge", [*talk, *judge, *text(30, 1)], 96)  # it takes the base's blocks
    ask("rewrite", [*talk, *judge, *rewrite, *text(30, 1)], 96)
    ask("plain", [*talk, *judge], 0)
    ask("", [*talk, *judge, *text(30, 1)], 96)  # the blocks after the invocation are its own
    ask("judge", [*talk, *judge, *text(30, 1), *text(9, 2)], 128)
    other = text(100, 3)
    ask("judge", [*other, *judge], 0)
    ask("", [*other, *text(5)], 96)  # the base takes those of an adapter
    ask("rewrite", [*other, *text(5), *rewrite], 96)  # and so does another adapter
    ask("judge", [*text(50, 4), *judge, *text(30, 5), *judge], 0)
    ask("judge", [*text(50, 4), *judge, *text(30, 5)], 48)  # its weights begin earlier
    ask("", [*text(50, 4), *judge, *text(30, 5), *text(20, 6)], 80)


def test_a_mix_may_hold_an_activated_adapter(oracle: PeftOracle, llm: LLM) -> None:
    """Before its invocation the others apply, with their own blocks."""
    prompt = [*text(40), *INVOCATIONS["judge"], *text(30, 1)]
    mix = LoRAMix([("judge", 1.0), ("plain", 1.0)])
    outputs = {}
    for name, lora in (("plain", LoRARequest("plain")), ("mix", mix), ("base", None)):
        (outputs[name],) = llm.generate(
            [{"prompt_token_ids": prompt}], greedy(prompt_logprobs=1), lora_request=lora
        )
    plain, mixed = outputs["plain"].prompt_logprobs, outputs["mix"].prompt_logprobs
    assert plain[1:41] == mixed[1:41] != outputs["base"].prompt_logprobs[1:41]
    assert plain[42:] != mixed[42:]
    (warm,) = llm.generate([{"prompt_token_ids": prompt}], greedy(), lora_request=mix)
    assert warm.outputs[0].token_ids == outputs["mix"].outputs[0].token_ids
    assert warm.num_cached_tokens == 64


@pytest.mark.e2e
def test_two_ranks(oracle: PeftOracle) -> None:
    cases = make_alora_cases()
    with make_llm(oracle, in_process=False, tensor_parallel_size=2) as llm:
        check(oracle, cases, answer(llm, cases))
