"""Greedy answers of Hugging Face + PEFT, and the adapters that parity tests share."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.models.peft_adapters import make_adapter


@dataclass(frozen=True)
class AdapterSpec:
    ranks: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


ADAPTERS = {
    "r1-q": AdapterSpec((1,), {"r": 1, "alpha": 4, "targets": ["q_proj"]}),
    "r4-regex": AdapterSpec((4,), {"r": 4, "alpha": 8, "targets": r".*\.mlp\.(gate|up|down)_proj"}),
    "r8-qkvo": AdapterSpec(
        (8,), {"r": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    ),
    "r16-all-rslora": AdapterSpec(
        (16,), {"r": 16, "alpha": 8, "targets": "all-linear", "use_rslora": True}
    ),
    "r17-pattern": AdapterSpec(
        (17, 3, 5),
        {
            "r": 17,
            "alpha": 20,
            "targets": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, r"layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 40, r"layers.0.self_attn.q_proj": 9},
        },
    ),
    "r64-kd": AdapterSpec((64,), {"r": 64, "alpha": 32, "targets": ["k_proj", "down_proj"]}),
}


@dataclass(frozen=True)
class Case:
    adapter: str  # empty: the base model
    prompt: tuple[int, ...]


def adapter_names() -> list[str]:
    return list(ADAPTERS)


def make_adapters(model: Any, root: Path, *, strength: float = 2.0) -> None:
    """`strength`: the size of each update beside that of the weight it is added to."""
    for seed, (name, spec) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / name, seed=seed, strength=strength, **spec.options)


class PeftOracle:
    """Answers one case at a time, with no batching, no cache reuse and no code of ours."""

    def __init__(
        self,
        base: Path,
        adapters: Path,
        *,
        num_new_tokens: int,
        model: Any = None,
        names: list[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.base, self.adapters = base, adapters
        self._names = adapter_names() if names is None else names
        self.num_new_tokens = num_new_tokens
        self._device = device
        self._given_model, self._dtype = model, dtype
        self._answers: dict[Case, list[int]] = {}

    @cached_property
    def model(self) -> PeftModel:
        base = self._given_model
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(self.base, dtype=self._dtype)
        base = base.to(self._device)
        first, *rest = self._names
        model = PeftModel.from_pretrained(base, self.adapters / first, adapter_name=first)
        for name in rest:
            model.load_adapter(self.adapters / name, adapter_name=name)
        return model.eval()

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def logits(self, case: Case, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens), vocabulary], of the case's adapter."""
        ids = torch.tensor([tokens], device=self._device)
        with torch.inference_mode():
            if not case.adapter:
                with self.model.disable_adapter():
                    return self.model(ids).logits[0].float()
            self.model.set_adapter(case.adapter)
            return self.model(ids).logits[0].float()

    def greedy(self, case: Case) -> list[int]:
        """The next tokens by Hugging Face's own generate, one sequence at a time."""
        if case not in self._answers:
            ids = torch.tensor([case.prompt], device=self._device)
            self._answers[case] = self._generate(case, ids)[0, len(case.prompt) :].tolist()
        return self._answers[case]

    def _generate(self, case: Case, ids: torch.Tensor) -> torch.Tensor:
        options = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "min_new_tokens": self.num_new_tokens,
            "max_new_tokens": self.num_new_tokens,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        with torch.inference_mode():
            if not case.adapter:
                with self.model.disable_adapter():
                    return self.model.generate(ids, **options)
            self.model.set_adapter(case.adapter)
            return self.model.generate(ids, **options)


def tight_num_pages(
    cases: list[Case], adapter_pages: int, *, num_new_tokens: int, block_tokens: int = 16
) -> int:
    """A pool in which all cases can start, with a page to spare for each, but not all go on."""

    def num_kv_pages(num_tokens: int) -> int:
        return sum(-(-(len(case.prompt) + num_tokens) // block_tokens) for case in cases)

    at_start = num_kv_pages(1) + len(cases)
    growth = num_kv_pages(num_new_tokens) - at_start
    assert growth >= 3, "the cases do not grow enough to run out of pages"
    return 1 + adapter_pages + at_start + growth // 3


def make_cases(
    oracle: PeftOracle, lengths: tuple[int, ...], adapters: tuple[str, ...] = ("", *ADAPTERS)
) -> list[Case]:
    """Each of the adapters, "" the base model, on a prompt of each length, interleaved."""
    generator = torch.Generator().manual_seed(11)
    cases = []
    for length in lengths:
        prompt = torch.randint(0, oracle.vocab_size, (length,), generator=generator)
        cases += [Case(name, tuple(prompt.tolist())) for name in adapters]
    return cases
