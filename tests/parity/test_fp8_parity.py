"""Engines with fp8 weights and fp8 pages against Hugging Face models rounded alike.

Rounding is a step function: where two ways to add come out on two sides of a step, one number of a
row differs by a step. So the engine must be far nearer to the rounded model than that one is to
the exact model, and in fp32 almost all log-probabilities must be equal. bf16 moves so many numbers
over a step that the engine must only be about as near to the exact model as the rounded one is.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex import LLM, LoRARequest, SamplingParams

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import Case, PeftOracle, make_adapters, make_cases
from helpers.models.rounded_models import RoundedCache, round_weights

ADAPTERS = ("", "r4-regex", "r16-all-rslora", "r17-pattern")
LENGTHS = (2, 17, 64)
NUM_NEW = 6
EQUAL = 2e-3  # log-probabilities
GPU_SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
             "head_dim": 64, "intermediate_size": 1024}  # fmt: skip


@dataclass
class Models:
    """A model in fp32 and its adapters, and the same rounded."""

    base: Path
    exact: PeftOracle
    rounded: PeftOracle


@pytest.fixture(scope="module", params=["llama3", "qwen3"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(request.param, tmp_path_factory.mktemp(request.param), intermediate_size=161)


def make_models(architecture: str, root: Path, *, ranks: int = 1, **sizes: int) -> Models:
    model = make_hf_model(architecture, root / "base", seed=3, **sizes)
    make_adapters(model, root / "adapters", strength=0.5)
    rounded = copy.deepcopy(model)
    round_weights(rounded, ranks)
    return Models(
        root / "base",
        *(PeftOracle(root / "base", root / "adapters", model=m) for m in (model, rounded)),
    )


def answers(models: Models, cases: list[Case], **options: Any) -> list[Any]:
    """Returns greedy answers with log-probabilities. Prompts run in chunks."""
    adapters = {name: str(models.exact.adapters / name) for name in ADAPTERS if name}
    options = {"device": "cpu", "in_process": True} | options
    with LLM(
        str(models.base), adapters=adapters, num_pages=400, skip_tokenizer_init=True,
        max_num_seqs=16, max_num_batched_tokens=48, **options,
    ) as llm:  # fmt: skip
        return llm.generate(
            [{"prompt_token_ids": case.prompt} for case in cases],
            SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False,
                           logprobs=1, prompt_logprobs=1),
            lora_request=[LoRARequest(case.adapter) if case.adapter else None for case in cases],
            use_tqdm=False,
        )  # fmt: skip


def check(
    cases: list[Case],
    outputs: list[Any],
    rounded: Callable[[Case, list[int]], torch.Tensor],
    exact: Callable[[Case, list[int]], torch.Tensor],
    equal_share: float = 0.9,
) -> None:
    """Compares with the logits that two models give for a case and the tokens of its answer."""
    error, effect, _ = differences(cases, outputs, rounded, exact)
    assert error.mean() < 0.1 * effect.mean(), (error.mean(), effect.mean())
    assert (error < EQUAL).float().mean() > equal_share


def differences(
    cases: list[Case],
    outputs: list[Any],
    rounded: Callable[[Case, list[int]], torch.Tensor],
    exact: Callable[[Case, list[int]], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns magnitudes of differences of log-probabilities, by token: of engine and rounded
    model, of the two models, of engine and exact model."""
    errors, effects, totals = [], [], []
    for case, output in zip(cases, outputs, strict=True):
        tokens = [*case.prompt, *output.outputs[0].token_ids]
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        got = torch.tensor([e[t].logprob for e, t in zip(entries, tokens[1:], strict=True)])
        chosen = torch.tensor(tokens[1:])[:, None]
        want, truth = (
            logits(case, tokens[:-1]).log_softmax(-1).gather(1, chosen)[:, 0]
            for logits in (rounded, exact)
        )
        errors.append(got - want)
        effects.append(truth - want)
        totals.append(got - truth)
    return torch.cat(errors).abs(), torch.cat(effects).abs(), torch.cat(totals).abs()


def test_weights(models: Models) -> None:
    cases = make_cases(models.exact, LENGTHS, ADAPTERS)
    outputs = answers(models, cases, quantization="fp8")
    check(cases, outputs, models.rounded.logits, models.exact.logits)


def rounding_kv(oracle: PeftOracle) -> Callable[[Case, list[int]], torch.Tensor]:
    """Returns the oracle's logits, with K and V rounded to e4m3."""

    def logits(case: Case, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode(), oracle.adapted(case.adapter) as model:
            return model(torch.tensor([tokens]), past_key_values=RoundedCache()).logits[0]

    return logits


def test_pages(models: Models) -> None:
    cases = make_cases(models.exact, LENGTHS, ADAPTERS)
    outputs = answers(models, cases, kv_cache_dtype="fp8")
    check(cases, outputs, rounding_kv(models.exact), models.exact.logits)


def test_weights_and_pages(models: Models) -> None:
    cases = make_cases(models.exact, LENGTHS, ADAPTERS)
    outputs = answers(models, cases, kv_cache_dtype="fp8", quantization="fp8")
    check(cases, outputs, rounding_kv(models.rounded), models.exact.logits)


def test_two_ranks(tmp_path: Path) -> None:
    models = make_models("llama", tmp_path, ranks=2, intermediate_size=161)
    cases = make_cases(models.exact, (17, 64), ("", "r16-all-rslora"))
    outputs = answers(
        models, cases, kv_cache_dtype="fp8", quantization="fp8", tensor_parallel_size=2,
        in_process=False,
    )  # fmt: skip
    logits = rounding_kv(models.rounded), models.exact.logits
    check(cases, outputs, *logits, equal_share=0.6)  # sums of two parts are other sums


@pytest.mark.gpu
@pytest.mark.parametrize("is_eager", [True, False])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_gpu(quantization: str, kv_dtype: str, is_eager: bool, tmp_path: Path) -> None:
    if (quantization, kv_dtype) == ("auto", "auto"):
        pytest.skip("nothing is rounded")
    models = make_models("llama3", tmp_path, **GPU_SIZES)
    cases = make_cases(models.exact, LENGTHS, ADAPTERS)
    outputs = answers(
        models, cases, device="cuda", dtype="bfloat16", quantization=quantization,
        kv_cache_dtype=kv_dtype, linear_backend="fp8" if quantization == "fp8" else "torch",
        enforce_eager=is_eager,
    )  # fmt: skip
    oracle = models.rounded if quantization == "fp8" else models.exact
    rounded = rounding_kv(oracle) if kv_dtype == "fp8" else oracle.logits
    _, effect, total = differences(cases, outputs, rounded, models.exact.logits)
    assert total.mean() < 1.5 * effect.mean() + 0.02, (total.mean(), effect.mean())
